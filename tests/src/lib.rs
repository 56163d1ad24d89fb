//! What tests the service as a whole: the simulator, and (in `tests/tests`) real processes.

pub mod sim;
