//! A gateway worker: the machine that production runs, and its clock.
//!
//! A step is a turn: what has happened is handled, and the turn ends. Time stands still until the world says
//! that the worker waits for the next thing it has a time for.

use std::fmt::{self, Debug};

use engine::batcher::{Batcher, Effect, Event, Failure, Outcome, Settings, WriteResult};
use engine::idempotency::{ClientToken, Scope};
use engine::ids::{Conn, Now, StoreId, TimeMs};
use engine::ops::{Op, OpKind};

use super::super::machines::Machine;
use super::leader::{BEGAN_MS, primary_of, record, session};
use super::{Wire, Wires, counter};

/// Beyond all that is waited for between two sends.
const DEADLINE_MS: u64 = 100_000;

pub struct Table {
    pub settings: Settings,
    /// Operations carry a token of their own, of this scope.
    pub tokens: Option<Scope>,
    pub tick_ms: u64,
    pub wires: Wires,
}

#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Cause {
    /// The worker's key was made at this revision; 0: it is gone.
    Session {
        born: u8,
    },
    Record {
        epoch: u8,
    },
    Connected {
        conn: u64,
        epoch: u8,
    },
    Closed {
        conn: u64,
    },
    Received {
        conn: u64,
        wire: u32,
    },
    /// `issued`: so many ticks after the beginning, as the client says.
    Write {
        op: u8,
        request: u8,
        issued: u8,
    },
    /// The next thing that it has a time for.
    Wait,
}

#[derive(Clone, Debug)]
pub enum Out {
    Send { conn: u64, wire: u32 },
    Wrote { request: u8, told: Told },
    Abandoned,
}

#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Told {
    /// The value after it, and whether it was applied before, under the same token.
    Applied {
        value: i128,
        replayed: bool,
    },
    NotApplied,
    Unknown,
    TooOld,
    /// What no correct run shows.
    Never(&'static str),
}

#[derive(Clone, Debug, Default)]
pub struct Face {
    /// Epochs whose primary is to be dialled.
    pub unconnected: Vec<u8>,
    /// What it waits for next is a request's deadline, or a moment to send again.
    pub waits: Option<Waits>,
    /// 0: none.
    pub session: u8,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Waits {
    ToSend,
    ForDeadline,
}

#[derive(Clone)]
pub struct Gateway {
    worker: Batcher,
    now: Now,
}

/// All but the worker's counts, which are for people: nothing is decided by them.
impl Debug for Gateway {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = format!("{:?}", self.worker);
        let (before, counts) = text.split_once("counts: Counts {").expect("a worker counts");
        let (_, after) = counts.split_once('}').expect("and ends to");
        write!(f, "{before}{after} {:?}", self.now)
    }
}

impl Gateway {
    pub fn new(table: &Table) -> Self {
        Self { worker: Batcher::new(table.settings.clone()), now: Now(0) }
    }

    fn event(&mut self, cause: Cause, table: &Table) -> Option<Event> {
        Some(match cause {
            Cause::Session { born } => Event::Session((born > 0).then(|| session(born))),
            Cause::Record { epoch } => Event::ShardRecord(record(epoch)),
            Cause::Connected { conn, epoch } => {
                Event::Connected { conn: Conn(conn), node: primary_of(epoch) }
            }
            Cause::Closed { conn } => Event::Closed { conn: Conn(conn) },
            Cause::Received { conn, wire } => match table.wires.borrow().get(wire) {
                Wire::From(reply) => Event::Reply { conn: Conn(conn), reply: reply.clone() },
                Wire::To(_) => return None,
            },
            Cause::Write { op, request, issued } => {
                let token = table.tokens.map(|scope| ClientToken {
                    scope,
                    token: vec![op].into(),
                    issued: Some(TimeMs(BEGAN_MS + u64::from(issued) * table.tick_ms)),
                    extra: 0,
                });
                let kind = OpKind::AddReturning { delta: 1 << (4 * op) };
                Event::Write {
                    request: request.into(),
                    ops: vec![Op { counter: counter(), kind }],
                    token,
                    deadline: self.now.plus_ms(DEADLINE_MS),
                }
            }
            Cause::Wait => {
                self.now = self.worker.next_deadline()?.max(self.now);
                return None;
            }
        })
    }

    fn told(result: &WriteResult) -> Told {
        match result.failed.first() {
            None => Told::Applied { value: result.values[0].1, replayed: result.replayed > 0 },
            Some((_, why)) => match why {
                Failure::TokenTooOld => Told::TooOld,
                Failure::SessionAbandoned => Told::Never("its number did not follow"),
                Failure::ResultGone => Told::Never("its result is gone"),
                Failure::Malformed => Told::Never("it could not be read"),
                Failure::TokenReused => Told::Never("its token is another request's"),
                Failure::TokenQuota => Told::Never("there are too many records"),
                why if why.outcome() == Outcome::NotApplied => Told::NotApplied,
                _ => Told::Unknown,
            },
        }
    }
}

impl Machine for Gateway {
    type Cause = Cause;
    type Out = Out;
    type Face = Face;
    type Table = Table;

    fn on(&mut self, cause: Cause, table: &mut Table, out: &mut Vec<Out>) {
        let event = self.event(cause, table);
        let mut effects = Vec::new();
        for event in event.into_iter().chain([Event::TurnEnded]) {
            self.worker.handle(self.now, event, &mut effects);
        }
        for effect in effects {
            out.push(match effect {
                Effect::Send { conn, message } => {
                    let wire = table.wires.borrow_mut().number(Wire::To(message));
                    Out::Send { conn: conn.0, wire }
                }
                Effect::Wrote { request, result } => {
                    Out::Wrote { request: request as u8, told: Self::told(&result) }
                }
                Effect::AbandonSession(_) => Out::Abandoned,
                Effect::Report(_) => continue,
                other => panic!("nothing asks for {other:?} here"),
            });
        }
    }

    fn now(&self) -> Now {
        self.now
    }

    fn face(&self) -> Face {
        let epoch_of = |store: StoreId| store.0 as u8;
        let waits = self.worker.next_deadline().map(|at| {
            if at.ms_since(self.now) > DEADLINE_MS / 2 { Waits::ForDeadline } else { Waits::ToSend }
        });
        Face {
            unconnected: self.worker.unconnected().iter().map(|at| epoch_of(at.store)).collect(),
            waits,
            session: self.worker.session().map_or(0, |id| id.0.revision as u8),
        }
    }
}
