//! What waits to be sent to the controller.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use futures::Stream;
use node_hooks_api::agent::signal::Kind;
use node_hooks_api::agent::{FromAgent, from_agent::Message};

/// What waits to be sent, from any task, without waiting.
///
/// # Guarantees
/// - What a handover waits for overtakes what is only told: a pause is never behind a port's counters.
/// - It is bounded: when it is full, the oldest of what is only told goes, else the oldest of all.
#[derive(Clone, Debug)]
pub struct Outbox(Arc<Mutex<Queues>>);

#[derive(Debug)]
struct Queues {
    urgent: VecDeque<Message>,
    other: VecDeque<Message>,
    capacity: usize,
    dropped: u64,
    /// Which stream may take from it: the newest.
    stream: u64,
    waker: Option<Waker>,
}

/// The messages, for as long as no newer stream takes them.
#[derive(Debug)]
pub(super) struct Outgoing {
    outbox: Outbox,
    stream: u64,
}

impl Outbox {
    /// An empty one that holds `capacity` messages, at least one.
    pub fn new(capacity: usize) -> Self {
        Self(Arc::new(Mutex::new(Queues {
            urgent: VecDeque::new(),
            other: VecDeque::new(),
            capacity: capacity.max(1),
            dropped: 0,
            stream: 0,
            waker: None,
        })))
    }

    /// Adds a message. Where nobody sends, it waits for the next stream, which begins anew.
    pub fn push(&self, message: Message) {
        let mut queues = self.lock();
        if queues.urgent.len() + queues.other.len() >= queues.capacity {
            let oldest = match queues.other.pop_front() {
                Some(other) => Some(other),
                None => queues.urgent.pop_front(),
            };
            queues.dropped += u64::from(oldest.is_some());
        }
        if is_urgent(&message) {
            queues.urgent.push_back(message);
        } else {
            queues.other.push_back(message);
        }
        let waker = queues.waker.take();
        drop(queues);
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// How many messages were dropped because it was full.
    pub fn dropped(&self) -> u64 {
        self.lock().dropped
    }

    /// Begins a stream with `first`; what waited was for the one before. That one ends.
    pub(super) fn stream(&self, first: Message) -> Outgoing {
        let mut queues = self.lock();
        queues.urgent.clear();
        queues.other.clear();
        queues.urgent.push_back(first);
        queues.stream += 1;
        let stream = queues.stream;
        let waker = queues.waker.take();
        drop(queues);
        if let Some(waker) = waker {
            waker.wake();
        }
        Outgoing {
            outbox: self.clone(),
            stream,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Queues> {
        // Nothing can panic while it is held.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Stream for Outgoing {
    type Item = FromAgent;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<FromAgent>> {
        let mut queues = self.outbox.lock();
        if queues.stream != self.stream {
            return Poll::Ready(None);
        }
        let next = match queues.urgent.pop_front() {
            Some(urgent) => Some(urgent),
            None => queues.other.pop_front(),
        };
        let Some(message) = next else {
            queues.waker = Some(context.waker().clone());
            return Poll::Pending;
        };
        Poll::Ready(Some(FromAgent {
            message: Some(message),
        }))
    }
}

/// Whether somebody waits for it: a handover, a migration, or the other end's patience.
fn is_urgent(message: &Message) -> bool {
    match message {
        Message::Signal(signal) => {
            matches!(signal.kind(), Kind::Paused | Kind::Resumed | Kind::Left)
        }
        Message::Hello(_)
        | Message::Heartbeat(_)
        | Message::Outcome(_)
        | Message::GateQuestion(_)
        | Message::GateWithdrawn(_) => true,
        Message::Port(_) | Message::Forgery(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use futures::{FutureExt, StreamExt};
    use node_hooks_api::agent::{Forgery, Heartbeat, Hello, Signal};

    use super::*;

    fn hello() -> Message {
        Message::Hello(Hello::default())
    }

    fn paused(at_ns: u64) -> Message {
        Message::Signal(Signal {
            kind: Kind::Paused.into(),
            at_ns,
            ..Signal::default()
        })
    }

    fn forgery(at_ns: u64) -> Message {
        Message::Forgery(Forgery {
            at_ns,
            ..Forgery::default()
        })
    }

    fn waiting(outgoing: &mut Outgoing) -> Vec<Message> {
        let mut messages = Vec::new();
        while let Some(Some(next)) = outgoing.next().now_or_never() {
            messages.extend(next.message);
        }
        messages
    }

    #[test]
    fn a_pause_overtakes_what_is_only_told() {
        let outbox = Outbox::new(8);
        let mut outgoing = outbox.stream(hello());
        outbox.push(forgery(1));
        outbox.push(paused(2));
        assert_eq!(waiting(&mut outgoing), [hello(), paused(2), forgery(1)]);
    }

    #[test]
    fn when_it_is_full_the_oldest_that_nobody_waits_for_goes_first() {
        let outbox = Outbox::new(3);
        let mut outgoing = outbox.stream(hello());
        for message in [forgery(1), forgery(2), paused(3), paused(4), paused(5)] {
            outbox.push(message);
        }
        assert_eq!(waiting(&mut outgoing), [paused(3), paused(4), paused(5)]);
        assert_eq!(outbox.dropped(), 3);
    }

    #[test]
    fn a_new_stream_begins_anew_and_ends_the_old() {
        let outbox = Outbox::new(8);
        let mut old = outbox.stream(hello());
        outbox.push(paused(1));
        let mut new = outbox.stream(hello());
        assert_eq!(old.next().now_or_never(), Some(None));
        assert_eq!(waiting(&mut new), [hello()]);
        outbox.push(Message::Heartbeat(Heartbeat::default()));
        assert_eq!(waiting(&mut new).len(), 1);
    }

    #[tokio::test]
    async fn whoever_waits_is_woken() {
        let outbox = Outbox::new(8);
        let mut outgoing = outbox.stream(hello());
        assert!(outgoing.next().await.is_some());
        let next = tokio::spawn(async move { outgoing.next().await });
        tokio::task::yield_now().await;
        outbox.push(paused(7));
        let message = next.await.unwrap().unwrap().message;
        assert_eq!(message, Some(paused(7)));
    }
}
