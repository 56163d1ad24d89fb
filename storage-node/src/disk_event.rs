//! The events of the disk, on their way to the loop.

use std::sync::Arc;
#[cfg(test)]
use std::sync::mpsc;

use engine::node::Event;

use crate::state::StateView;

/// An event of the disk. [`Disk::accept`](crate::disk::Disk::accept) opens it.
#[derive(Debug)]
pub struct DiskEvent {
    pub(crate) event: Event,
    /// The state as the state machine knows it once it has handled the event.
    pub(crate) view: Option<StateView>,
}

/// The sink of disk events.
#[derive(Clone)]
pub(crate) struct EventSink(Arc<dyn Fn(DiskEvent) + Send + Sync>);

impl EventSink {
    pub(crate) fn new(send: impl Fn(DiskEvent) + Send + Sync + 'static) -> Self {
        Self(Arc::new(send))
    }

    pub(crate) fn send(&self, event: Event) {
        (self.0)(DiskEvent { event, view: None });
    }

    pub(crate) fn send_with_view(&self, event: Event, view: StateView) {
        (self.0)(DiskEvent { event, view: Some(view) });
    }

    #[cfg(test)]
    pub(crate) fn to_channel() -> (Self, mpsc::Receiver<Event>) {
        let (send, events) = mpsc::channel();
        let sink = move |sent: DiskEvent| send.send(sent.event).expect("the test listens");
        (Self(Arc::new(sink)), events)
    }
}
