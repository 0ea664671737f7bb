//! What callers and the task behind a connection share: what is to be written, and who waits for which answer.
//!
//! The lock is held for as long as it takes to copy a message and to offer it to the socket, and never across a wait.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};

use bytes::{Buf, BytesMut};
use tokio::io::AsyncWrite;
use tokio::sync::{Notify, oneshot, watch};

use crate::Nanos;
use crate::openflow::message::{self, Message, kind};
use crate::openflow::packets::PacketOuts;
use crate::openflow::version::Version;
use crate::openflow::{Error, Refusal};

/// What a socket may not have taken. A switch that reads takes everything; one that does not must not fill our memory.
const MOST_UNWRITTEN: usize = 1 << 20;
/// Barriers that may be waiting for their replies. OVS replies within milliseconds.
const MOST_WAITING: usize = 1024;

type Writer = Box<dyn AsyncWrite + Send + Unpin>;

pub(super) struct Core {
    version: Version,
    state: Mutex<State>,
    /// There is something that the socket did not take.
    unwritten: Notify,
    /// Bytes written in all.
    progress: watch::Sender<u64>,
    failure: watch::Sender<Option<Error>>,
}

struct State {
    writer: Writer,
    /// Taken and not yet written.
    out: BytesMut,
    /// Bytes written in all.
    written: u64,
    next_xid: u32,
    waiting: VecDeque<Waiting>,
}

/// Packet-outs, and the barrier behind them.
struct Waiting {
    /// The transaction of the first message; the others' follow it.
    first: u32,
    /// Of the packet-outs. The barrier has the transaction after the last one's.
    ports: Vec<u16>,
    refused: Option<Error>,
    done: oneshot::Sender<Result<Nanos, Error>>,
}

/// What became of something that is to be sent.
pub(super) struct Taken {
    pub(super) written: Option<Nanos>,
    pub(super) until: u64,
    pub(super) processed: oneshot::Receiver<Result<Nanos, Error>>,
}

impl Core {
    pub(super) fn new(version: Version, writer: Writer) -> Self {
        Self {
            version,
            state: Mutex::new(State {
                writer,
                out: BytesMut::new(),
                written: 0,
                next_xid: 1,
                waiting: VecDeque::new(),
            }),
            unwritten: Notify::new(),
            progress: watch::Sender::new(0),
            failure: watch::Sender::new(None),
        }
    }

    pub(super) fn progress(&self) -> watch::Receiver<u64> {
        self.progress.subscribe()
    }

    pub(super) fn failure(&self) -> Option<Error> {
        self.failure.borrow().clone()
    }

    pub(super) async fn ended(&self) -> Error {
        let mut failure = self.failure.subscribe();
        // The sender is in here too.
        let error = failure.wait_for(Option::is_some).await;
        error
            .ok()
            .and_then(|error| error.clone())
            .unwrap_or(Error::Closed)
    }

    /// No more is taken, and who waits is told.
    pub(super) fn end(&self, error: Error) {
        // Under the lock: who was taken before is told here, and who comes after is not taken.
        let mut state = self.lock();
        self.fail(error);
        state.waiting.clear();
        state.out.clear();
    }

    pub(super) fn send(&self, packets: &PacketOuts) -> Result<Taken, Error> {
        let ports = packets.ports();
        let (done, processed) = oneshot::channel();
        let mut state = self.lock();
        if let Some(error) = self.failure() {
            return Err(error);
        }
        if state.waiting.len() >= MOST_WAITING {
            return Err(Error::Stuck("it replies to no barriers"));
        }
        if state.out.len() >= MOST_UNWRITTEN {
            return Err(Error::Stuck("it does not read"));
        }
        let first = state.next_xid;
        let barrier = u32::try_from(ports.len()).map_or(first, |count| first.wrapping_add(count));
        state.next_xid = barrier.wrapping_add(1);
        state.waiting.push_back(Waiting {
            first,
            ports,
            refused: None,
            done,
        });
        let written = self.write(&mut state, |out, version| {
            packets.put(out, version, first);
            let request = message::barrier_request(version);
            message::put_plain(out, version, request, barrier);
        })?;
        Ok(Taken {
            written,
            until: state.written + state.out.len() as u64,
            processed,
        })
    }

    /// Asks for an echo.
    pub(super) fn probe(&self) -> Result<(), Error> {
        let mut state = self.lock();
        let xid = state.next_xid;
        state.next_xid = xid.wrapping_add(1);
        self.write(&mut state, |out, version| {
            message::put_plain(out, version, kind::ECHO_REQUEST, xid);
        })
        .map(drop)
    }

    /// Takes a message of the switch's.
    pub(super) fn receive(&self, message: &Message) -> Result<(), Error> {
        // An error may be of the version of whatever it is about, and a hello is of the sender's newest.
        let any = matches!(message.kind, kind::ERROR | kind::HELLO);
        if message.version != self.version.number() && !any {
            return Err(Error::Protocol(format!(
                "a message of version {:#04x} on a connection of {:#04x}",
                message.version,
                self.version.number()
            )));
        }
        match message.kind {
            kind::ECHO_REQUEST => self.answer(message),
            kind::ERROR => {
                self.refused(message.xid, Refusal::read(message));
                Ok(())
            }
            reply if reply == message::barrier_reply(self.version) => {
                self.processed(message.xid);
                Ok(())
            }
            // Nothing else is asked for; what comes all the same is somebody else's business.
            other => {
                tracing::trace!(kind = other, "ignoring a message of the switch's");
                Ok(())
            }
        }
    }

    /// Waits until there is something that the socket has not taken. Cancel safe.
    pub(super) async fn unwritten(&self) {
        while self.lock().out.is_empty() {
            self.unwritten.notified().await;
        }
    }

    /// Writes all there is.
    pub(super) fn poll_write(&self, context: &mut Context<'_>) -> Poll<Result<(), Error>> {
        let mut state = self.lock();
        let outcome = state.poll_write(context);
        self.progress.send_replace(state.written);
        outcome.map_err(|error| Error::Lost(Arc::new(error)))
    }

    fn answer(&self, request: &Message) -> Result<(), Error> {
        let mut state = self.lock();
        if state.out.len() >= MOST_UNWRITTEN {
            return Err(Error::Stuck("it does not read the echoes that it asks for"));
        }
        self.write(&mut state, |out, version| {
            message::put_echo_reply(out, version, request);
        })
        .map(drop)
    }

    /// Writes what `put` appends: at once, as long as the socket takes it all; then the time. The rest is for the task
    /// behind.
    fn write(
        &self,
        state: &mut State,
        put: impl FnOnce(&mut BytesMut, Version),
    ) -> Result<Option<Nanos>, Error> {
        let behind_others = !state.out.is_empty();
        put(&mut state.out, self.version);
        if behind_others {
            // The task waits for the socket already, and polling it here would take its place in that.
            return Ok(None);
        }
        let outcome = state.poll_write(&mut Context::from_waker(Waker::noop()));
        if let Poll::Ready(Ok(())) = outcome {
            return Ok(Some(Nanos::now()));
        }
        // The task finds out why, too, and ends.
        self.unwritten.notify_one();
        match outcome {
            Poll::Ready(Err(error)) => {
                let error = Error::Lost(Arc::new(error));
                self.fail(error.clone());
                Err(error)
            }
            _ => Ok(None),
        }
    }

    fn refused(&self, xid: u32, refusal: Refusal) {
        let mut state = self.lock();
        let found = state
            .waiting
            .iter_mut()
            .find_map(|waiting| Some((waiting.place(xid)?, waiting)));
        let Some((place, waiting)) = found else {
            tracing::debug!(%refusal, "the switch tells of an error in nothing that waits");
            return;
        };
        if let Some(&in_port) = waiting.ports.get(place) {
            tracing::warn!(in_port, %refusal, "the switch refuses a packet-out");
            let error = Error::RefusedPacketOut { in_port, refusal };
            waiting.refused.get_or_insert(error);
        } else {
            // No reply will come.
            let error = Error::RefusedBarrier(refusal);
            waiting.refused.get_or_insert(error);
            drop(state);
            self.processed(xid);
        }
    }

    fn processed(&self, xid: u32) {
        let at = Nanos::now();
        let mut state = self.lock();
        let place = state
            .waiting
            .iter()
            .position(|waiting| waiting.place(xid) == Some(waiting.ports.len()));
        // A reply that nobody waits for is nobody's business.
        if let Some(waiting) = place.and_then(|place| state.waiting.remove(place)) {
            // Who asked may have gone.
            let _ = waiting.done.send(waiting.refused.map_or(Ok(at), Err));
        }
    }

    /// The first failure counts.
    fn fail(&self, error: Error) {
        self.failure.send_if_modified(|failure| {
            let first = failure.is_none();
            failure.get_or_insert(error);
            first
        });
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing below panics halfway through a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn poll_write(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.out.is_empty() {
            let count = ready!(Pin::new(&mut *self.writer).poll_write(context, &self.out))?;
            if count == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.out.advance(count);
            self.written += count as u64;
        }
        Poll::Ready(Ok(()))
    }
}

impl Waiting {
    /// Which of the messages has this transaction: a packet-out's place, or their number for the barrier.
    fn place(&self, xid: u32) -> Option<usize> {
        let place = usize::try_from(xid.wrapping_sub(self.first)).ok()?;
        (place <= self.ports.len()).then_some(place)
    }
}

impl fmt::Debug for Core {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Core")
            .field("version", &self.version)
            .field("failure", &*self.failure.borrow())
            .finish_non_exhaustive()
    }
}
