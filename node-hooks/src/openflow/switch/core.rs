//! What callers and the task behind a connection share: what is to be written, and who waits for which answer.
//!
//! The lock is held for as long as it takes to copy a message and to offer it to the socket, and never across a wait.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::AsyncWrite;
use tokio::sync::{Notify, oneshot, watch};

use crate::Nanos;
use crate::openflow::blocks::{self, Block, Wanted};
use crate::openflow::message::{self, MULTIPART_REPLY_HEADER, Message, kind};
use crate::openflow::packets::PacketOuts;
use crate::openflow::version::Version;
use crate::openflow::{Error, Refusal};

/// What a socket may not have taken. A switch that reads takes everything; one that does not must not fill our memory.
const MOST_UNWRITTEN: usize = 1 << 20;
/// Barriers that may be waiting for their replies. OVS replies within milliseconds.
const MOST_WAITING: usize = 1024;
/// Of one answer in parts. That about one port's flows is a few kilobytes.
const LONGEST_ANSWER: usize = 1 << 20;

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
    /// By transaction.
    asking: HashMap<u32, Asking>,
}

/// An answer that comes in parts.
struct Asking {
    parts: Vec<Bytes>,
    /// Of the parts, in all.
    length: usize,
    done: oneshot::Sender<Result<Vec<Bytes>, Error>>,
}

/// Packet-outs, removals of flows, and the barrier behind them.
struct Waiting {
    /// The transaction of the first packet-out; the others' follow it, then the removals' and the barrier's.
    first: u32,
    /// Of the packet-outs.
    ports: Vec<u16>,
    removals: usize,
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
                asking: HashMap::new(),
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
        state.asking.clear();
        state.out.clear();
    }

    pub(super) fn send(&self, packets: &PacketOuts, blocks: &[Block]) -> Result<Taken, Error> {
        let ports = packets.ports();
        let (done, processed) = oneshot::channel();
        let mut state = self.lock();
        self.may_take(&state)?;
        let number = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        let first = state.next_xid;
        let removal = first.wrapping_add(number(ports.len()));
        let barrier = removal.wrapping_add(number(blocks.len()));
        state.next_xid = barrier.wrapping_add(1);
        state.waiting.push_back(Waiting {
            first,
            ports,
            removals: blocks.len(),
            refused: None,
            done,
        });
        let written = self.write(&mut state, |out, version| {
            // What shuts the ports goes first: then the frames find them open.
            for (xid, block) in (0..).map(|place| removal.wrapping_add(place)).zip(blocks) {
                blocks::put_removal(out, version, xid, block);
            }
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

    /// Asks for flows. The answer comes in parts.
    pub(super) fn ask(
        &self,
        wanted: Wanted,
    ) -> Result<oneshot::Receiver<Result<Vec<Bytes>, Error>>, Error> {
        let (done, answer) = oneshot::channel();
        let mut state = self.lock();
        // What nobody waits for does not count: a switch that answers no questions may open ports all the same.
        state.asking.retain(|_, asking| !asking.done.is_closed());
        self.may_take(&state)?;
        let xid = state.next_xid;
        state.next_xid = xid.wrapping_add(1);
        let asking = Asking {
            parts: Vec::new(),
            length: 0,
            done,
        };
        state.asking.insert(xid, asking);
        self.write(&mut state, |out, version| {
            blocks::put_request(out, version, xid, wanted);
        })?;
        Ok(answer)
    }

    fn may_take(&self, state: &State) -> Result<(), Error> {
        if let Some(error) = self.failure() {
            return Err(error);
        }
        if state.waiting.len() + state.asking.len() >= MOST_WAITING {
            return Err(Error::Stuck("it does not answer"));
        }
        if state.out.len() >= MOST_UNWRITTEN {
            return Err(Error::Stuck("it does not read"));
        }
        Ok(())
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
            kind::MULTIPART_REPLY if blocks::speaks(self.version) => {
                self.answered(message.xid, &message.body)
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

    /// Takes a part of an answer.
    fn answered(&self, xid: u32, part: &Bytes) -> Result<(), Error> {
        let mut state = self.lock();
        let Some(asking) = state.asking.get_mut(&xid) else {
            return Ok(());
        };
        asking.parts.push(part.clone());
        // A part takes room even if it is empty.
        asking.length += part.len().max(MULTIPART_REPLY_HEADER);
        if asking.length > LONGEST_ANSWER {
            return Err(Error::Stuck("an answer of it has no end"));
        }
        if !blocks::has_more(part)
            && let Some(Asking { parts, done, .. }) = state.asking.remove(&xid)
        {
            // Who asked may have gone.
            let _ = done.send(Ok(parts));
        }
        Ok(())
    }

    fn refused(&self, xid: u32, refusal: Refusal) {
        let mut state = self.lock();
        if let Some(asking) = state.asking.remove(&xid) {
            let _ = asking.done.send(Err(Error::RefusedQuestion(refusal)));
            return;
        }
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
        } else if place < waiting.barrier() {
            // ovn-controller removes it too.
            tracing::debug!(%refusal, "the switch refuses the removal of a flow");
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
            .position(|waiting| waiting.place(xid) == Some(waiting.barrier()));
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
    /// Which of the messages has this transaction: first the packet-outs, then the removals, then the barrier.
    fn place(&self, xid: u32) -> Option<usize> {
        let place = usize::try_from(xid.wrapping_sub(self.first)).ok()?;
        (place <= self.barrier()).then_some(place)
    }

    fn barrier(&self) -> usize {
        self.ports.len() + self.removals
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
