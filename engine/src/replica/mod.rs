//! One replica of one shard: its roles (being written).
