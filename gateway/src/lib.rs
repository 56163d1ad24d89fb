//! hyper HTTP in, answers out: the driver of the engine's gateway machine.

pub mod problem;
pub mod request;
