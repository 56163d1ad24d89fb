//! The driver of `engine::coordinator`: who leads, what etcd says, which nodes answer.
//!
//! It decides nothing about shards. Events go into the machine, its effects are performed, and what came of them goes
//! back in:
//!
//! ```text
//!   election ── Elected, Deposed ──▶ ┌────────┐ ── List, Propose ──▶ etcd ──▶ Listed, Proposed, Changed ──┐
//!   nodes    ── Reported ──────────▶ │ driver │ ── Probe, Gather, StepDown ──▶ nodes ──▶ Probed, … ───────┤
//!                                    └────────┘ ◀───────────────────────────────────────────────────────┘
//! ```
//!
//! What a newcomer would get wrong: none of this is on the way of a read or a write, and none of it keeps data safe.
//! With every coordinator gone, or etcd down, nodes and gateways go on; two that both think they lead do no harm, since
//! each change compares the term of who asks for it (DESIGN §5, §9).

mod book;
mod driver;
mod etcd;
mod exit;
mod metrics;
mod nodes;
mod options;
mod reports;
mod service;
mod tell;

pub use exit::Exit;
pub use options::Options;
pub use service::{run, serve};
