//! A gateway worker: the batcher that production runs, with its clock.
//!
//! A step is a turn: the worker handles an event and ends the turn. Time advances only by
//! [`GatewayInput::Wait`], up to the next deadline of the worker.

use std::fmt::{self, Debug};

use engine::batcher::{Batcher, Effect, Event, Failure, Outcome, Settings, WriteResult};
use engine::ids::{Conn, Now, StoreId, TimeMs};
use engine::ops::{Op, OpKind};
use engine::shard::idempotency::{ClientToken, Scope};

use super::super::machines::Machine;
use super::leader::{BEGAN_MS, primary_of, record, session};
use super::{GatewayWireMessage, Wires, counter};

/// The deadline of a request, which is longer than all waits between two sends.
const DEADLINE_MS: u64 = 100_000;

pub struct GatewayContext {
    pub settings: Settings,
    /// The scope of the tokens of operations; `None` for operations without tokens.
    pub tokens: Option<Scope>,
    pub tick_ms: u64,
    pub wires: Wires,
}

#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum GatewayInput {
    /// The key of the worker was created at this revision; 0 if it is gone.
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
    /// A write. `issued` is the time of the token, in ticks after the start.
    Write {
        op: u8,
        request: u8,
        issued: u8,
    },
    /// Time passes up to the next deadline of the worker.
    Wait,
}

#[derive(Clone, Debug)]
pub enum GatewayOutput {
    Send { conn: u64, wire: u32 },
    Wrote { request: u8, answer: ClientAnswer },
    Abandoned,
}

#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum ClientAnswer {
    /// The value after the op, and whether the op was applied before under the same token.
    Applied {
        value: i128,
        replayed: bool,
    },
    NotApplied,
    Unknown,
    TooOld,
    /// An answer that is impossible in a correct run.
    Never(&'static str),
}

#[derive(Clone, Debug, Default)]
pub struct GatewaySummary {
    /// The epochs whose primary has to be dialled.
    pub unconnected: Vec<u8>,
    /// The next deadline: that of a request, or the time to send again.
    pub waits: Option<Waits>,
    /// The revision of its session; 0 if it has none.
    pub session: u8,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Waits {
    ToSend,
    ForDeadline,
}

#[derive(Clone)]
pub struct Gateway {
    batcher: Batcher,
    now: Now,
}

/// Prints everything except the counts of the worker, which affect no decision.
impl Debug for Gateway {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = format!("{:?}", self.batcher);
        let (before, counts) =
            text.split_once("counts: Counts {").expect("the text has the counts");
        let (_, after) = counts.split_once('}').expect("the counts end");
        write!(f, "{before}{after} {:?}", self.now)
    }
}

impl Gateway {
    pub fn new(context: &GatewayContext) -> Self {
        Self { batcher: Batcher::new(context.settings.clone()), now: Now(0) }
    }

    fn event(&mut self, input: GatewayInput, context: &GatewayContext) -> Option<Event> {
        Some(match input {
            GatewayInput::Session { born } => Event::Session((born > 0).then(|| session(born))),
            GatewayInput::Record { epoch } => Event::ShardRecord(record(epoch)),
            GatewayInput::Connected { conn, epoch } => {
                Event::Connected { conn: Conn(conn), node: primary_of(epoch) }
            }
            GatewayInput::Closed { conn } => Event::Closed { conn: Conn(conn) },
            GatewayInput::Received { conn, wire } => match context.wires.borrow().get(wire) {
                GatewayWireMessage::From(reply) => {
                    Event::Reply { conn: Conn(conn), reply: reply.clone() }
                }
                GatewayWireMessage::To(_) => return None,
            },
            GatewayInput::Write { op, request, issued } => {
                let token = context.tokens.map(|scope| ClientToken {
                    scope,
                    token: vec![op].into(),
                    issued: Some(TimeMs(BEGAN_MS + u64::from(issued) * context.tick_ms)),
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
            GatewayInput::Wait => {
                self.now = self.batcher.next_deadline()?.max(self.now);
                return None;
            }
        })
    }

    fn answer_of(result: &WriteResult) -> ClientAnswer {
        match result.failed.first() {
            None => {
                ClientAnswer::Applied { value: result.values[0].1, replayed: result.replayed > 0 }
            }
            Some((_, why)) => match why {
                Failure::TokenTooOld => ClientAnswer::TooOld,
                Failure::SessionAbandoned => ClientAnswer::Never("its number did not follow"),
                Failure::ResultGone => ClientAnswer::Never("its result is gone"),
                Failure::Malformed => ClientAnswer::Never("it could not be read"),
                Failure::TokenReused => ClientAnswer::Never("its token is another request's"),
                Failure::TokenQuota => ClientAnswer::Never("there are too many records"),
                why if why.outcome() == Outcome::NotApplied => ClientAnswer::NotApplied,
                _ => ClientAnswer::Unknown,
            },
        }
    }
}

impl Machine for Gateway {
    type Input = GatewayInput;
    type Output = GatewayOutput;
    type Summary = GatewaySummary;
    type Context = GatewayContext;

    fn on(
        &mut self,
        input: GatewayInput,
        context: &mut GatewayContext,
        out: &mut Vec<GatewayOutput>,
    ) {
        let event = self.event(input, context);
        let mut effects = Vec::new();
        for event in event.into_iter().chain([Event::TurnEnded]) {
            self.batcher.handle(self.now, event, &mut effects);
        }
        for effect in effects {
            out.push(match effect {
                Effect::Send { conn, message } => {
                    let wire = context.wires.borrow_mut().number(GatewayWireMessage::To(message));
                    GatewayOutput::Send { conn: conn.0, wire }
                }
                Effect::Wrote { request, result } => GatewayOutput::Wrote {
                    request: request as u8,
                    answer: Self::answer_of(&result),
                },
                Effect::AbandonSession(_) => GatewayOutput::Abandoned,
                Effect::Report(_) => continue,
                other => panic!("unexpected effect {other:?}"),
            });
        }
    }

    fn now(&self) -> Now {
        self.now
    }

    fn summary(&self) -> GatewaySummary {
        let epoch_of = |store: StoreId| store.0 as u8;
        let waits = self.batcher.next_deadline().map(|at| {
            if at.ms_since(self.now) > DEADLINE_MS / 2 { Waits::ForDeadline } else { Waits::ToSend }
        });
        GatewaySummary {
            unconnected: self.batcher.unconnected().iter().map(|at| epoch_of(at.store)).collect(),
            waits,
            session: self.batcher.session().map_or(0, |id| id.0.revision as u8),
        }
    }
}
