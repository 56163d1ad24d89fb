//! Rows of the state: keys, values, and the shard record.
