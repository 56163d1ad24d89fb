//! The shell of a role: everything that its process does as the processes of the other roles do.
//!
//! A role declares its options with those of [`ClusterOptions`], [`ProcessOptions`] and
//! [`ListenOptions`], and calls [`run`] with a future that ends with a [`ProcessExit`] or without
//! one. Within it, [`StopSignals`] waits for SIGTERM and SIGINT, [`bind`] opens a port, and
//! [`endpoint`] dials other processes of the cluster. The crate knows no rule of any role.

mod dial;
mod exit;
mod listen;
mod options;
mod run;

pub use dial::{CONNECT_TIMEOUT, Pings, causes, endpoint, is_refused};
pub use exit::ProcessExit;
pub use listen::{bind, monitoring};
pub use options::{ClusterOptions, ListenOptions, ProcessOptions};
pub use run::{StopSignals, run};
