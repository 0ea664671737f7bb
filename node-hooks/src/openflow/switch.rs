//! A connection to a switch.

mod core;

use std::future::poll_fn;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::{oneshot, watch};
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::codec::FramedRead;

use self::core::{Core, Taken};
use super::blocks::{self, Block, Wanted};
use super::message::{self, Codec, FrameError, Message, kind};
use super::packets::PacketOuts;
use super::version::{Version, Versions};
use super::{Error, Refusal};
use crate::Nanos;

/// How long a switch may take to say hello.
const HELLO: Duration = Duration::from_secs(5);
/// After how much silence a switch is asked for an echo; after as much again the connection ends.
const PROBE: Duration = Duration::from_secs(5);

/// A connection to a switch, which ends with its last clone.
///
/// # Guarantees
/// - What is sent is written to the socket before the call returns, as long as the socket takes it: no other task has to
///   run first. What the socket does not take is written in the background, in order and whole; a future that is dropped
///   cuts no message short.
/// - Echo requests are answered, and a switch that falls silent is probed and left.
/// - No bytes of the switch's, however wrong, cause a panic or let memory grow: they end the connection, or fail the
///   question that they answer.
///
/// # Caveats
/// - A switch takes a packet-out of a port that it does not have, as long as the number is one that it could have: then
///   nothing happens, and nobody says so.
#[derive(Clone, Debug)]
pub struct Switch(Arc<Connection>);

#[derive(Debug)]
struct Connection {
    core: Arc<Core>,
    version: Version,
    driver: AbortHandle,
}

/// Something that was sent to a switch.
#[derive(Debug)]
#[must_use = "what was sent may still have to be written, and the switch may refuse it"]
pub struct Sent {
    written: Option<Nanos>,
    /// How many bytes the connection has to have written, in all, for it to be written.
    until: u64,
    progress: watch::Receiver<u64>,
    processed: oneshot::Receiver<Result<Nanos, Error>>,
    /// The connection lives for as long as somebody waits for an answer.
    switch: Switch,
}

impl Switch {
    /// Connects to a bridge's management socket.
    ///
    /// # Errors
    /// [`Error::Connect`], and what a switch's hello can be wrong with.
    pub async fn connect(socket: &Path) -> Result<Self, Error> {
        let name = socket.display().to_string();
        let stream = timeout(HELLO, UnixStream::connect(socket)).await;
        let stream = stream
            .map_err(|_| Error::NoHello {
                socket: name.clone(),
                after: HELLO,
            })?
            .map_err(|source| Error::Connect {
                socket: name.clone(),
                source: Arc::new(source),
            })?;
        let (read, write) = stream.into_split();
        Self::greet(&name, read, write).await
    }

    /// Greets a switch at the other end of a stream.
    pub(super) async fn greet<R, W>(name: &str, read: R, mut write: W) -> Result<Self, Error>
    where
        R: AsyncRead + Send + Unpin + 'static,
        W: AsyncWrite + Send + Unpin + 'static,
    {
        let mut read = FramedRead::new(read, Codec);
        let greeting = async {
            let mut hello = BytesMut::new();
            message::put_hello(&mut hello);
            write
                .write_all(&hello)
                .await
                .map_err(|error| lost(error.into()))?;
            next(&mut read).await
        };
        let hello = timeout(HELLO, greeting)
            .await
            .map_err(|_| Error::NoHello {
                socket: name.to_owned(),
                after: HELLO,
            })??;
        let version = agree(name, &hello)?;
        tracing::debug!(socket = name, %version, "connected to the switch");
        let core = Arc::new(Core::new(version, Box::new(write)));
        let driver = tokio::spawn(drive(core.clone(), read)).abort_handle();
        Ok(Self(Arc::new(Connection {
            core,
            version,
            driver,
        })))
    }

    /// The version that was agreed on.
    pub fn version(&self) -> Version {
        self.0.version
    }

    /// Sends frames and a barrier behind them, in a single write.
    ///
    /// # Errors
    /// The connection has ended; some of the frames may have been written if it ended just now.
    pub fn send(&self, packets: &PacketOuts) -> Result<Sent, Error> {
        self.put(packets, &[])
    }

    /// Has the switch remove flows, where they are still there, and sends a barrier behind that, in a single write.
    ///
    /// # Errors
    /// Like [`send`](Self::send). A flow that the switch does not remove is none, and neither is a version in which
    /// [`blocks`](Self::blocks) finds none: then there is the barrier alone.
    pub fn remove(&self, blocks: &[Block]) -> Result<Sent, Error> {
        // Found on an earlier connection; in 1.0 the same bytes say something else.
        let blocks = if blocks::speaks(self.0.version) {
            blocks
        } else {
            &[]
        };
        self.put(&PacketOuts::new(), blocks)
    }

    fn put(&self, packets: &PacketOuts, blocks: &[Block]) -> Result<Sent, Error> {
        let core = &self.0.core;
        let Taken {
            written,
            until,
            processed,
        } = core.send(packets, blocks)?;
        Ok(Sent {
            written,
            until,
            progress: core.progress(),
            processed,
            switch: self.clone(),
        })
    }

    /// What shuts a port until OVN activates it: nothing, if it is open.
    ///
    /// # Errors
    /// The connection has ended, or the switch refuses to tell, or what it tells makes no sense. None for a version before
    /// 1.3, of which it is not known here how it describes flows: then nothing is asked, and nothing found.
    pub async fn blocks(&self, port: u16) -> Result<Vec<Block>, Error> {
        let version = self.0.version;
        if !blocks::speaks(version) {
            return Ok(Vec::new());
        }
        let shut = self.ask(Wanted::In(port)).await?;
        match blocks::cookie(version, &shut, port)? {
            Some(cookie) => blocks::blocks(version, &self.ask(Wanted::With(cookie)).await?),
            None => Ok(Vec::new()),
        }
    }

    async fn ask(&self, wanted: Wanted) -> Result<Vec<Bytes>, Error> {
        match self.0.core.ask(wanted)?.await {
            Ok(answer) => answer,
            Err(_) => Err(self.ended().await),
        }
    }

    /// Waits until the switch has processed all that was sent before.
    ///
    /// # Errors
    /// The connection has ended.
    pub async fn barrier(&self) -> Result<Nanos, Error> {
        self.send(&PacketOuts::new())?.processed().await
    }

    /// Waits until the connection has ended, and tells why.
    pub async fn ended(&self) -> Error {
        self.0.core.ended().await
    }

    /// Whether it has not ended, as far as is known.
    pub fn is_alive(&self) -> bool {
        self.0.core.failure().is_none()
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

impl Sent {
    /// When all of it had been written, if that was so at once.
    pub fn written_at_once(&self) -> Option<Nanos> {
        self.written
    }

    /// Waits until all of it has been written to the socket, and tells when. Cancel safe.
    ///
    /// # Errors
    /// The connection has ended before.
    pub async fn written(&mut self) -> Result<Nanos, Error> {
        if let Some(at) = self.written {
            return Ok(at);
        }
        let until = self.until;
        // What has been written has, even if the connection has ended since.
        let ended = tokio::select! {
            biased;
            Ok(_) = self.progress.wait_for(|written| *written >= until) => None,
            error = self.switch.ended() => Some(error),
        };
        if let Some(error) = ended.filter(|_| *self.progress.borrow() < until) {
            return Err(error);
        }
        let at = Nanos::now();
        self.written = Some(at);
        Ok(at)
    }

    /// Waits until the switch has processed it, and tells when its word came.
    ///
    /// Only the end of the connection bounds the time: a switch that answers echoes and no barriers is waited for.
    ///
    /// # Errors
    /// [`Error::RefusedPacketOut`] for the first packet-out that the switch refuses, or the connection has ended before.
    pub async fn processed(self) -> Result<Nanos, Error> {
        match self.processed.await {
            Ok(outcome) => outcome,
            Err(_) => Err(self.switch.ended().await),
        }
    }
}

/// Reads and answers until the connection ends.
async fn drive<R: AsyncRead + Unpin>(core: Arc<Core>, mut read: FramedRead<R, Codec>) {
    let mut deadline = Instant::now() + PROBE;
    let mut probing = false;
    let error = loop {
        tokio::select! {
            message = next(&mut read) => match message.and_then(|message| core.receive(&message)) {
                Ok(()) => {
                    deadline = Instant::now() + PROBE;
                    probing = false;
                }
                Err(error) => break error,
            },
            error = write_rest(&core) => break error,
            () = sleep_until(deadline) => {
                if probing {
                    break Error::Silent(2 * PROBE);
                }
                if let Err(error) = core.probe() {
                    break error;
                }
                deadline += PROBE;
                probing = true;
            }
        }
    };
    core.end(error);
}

/// Writes what the socket did not take at once, for as long as there is no error. Cancel safe.
async fn write_rest(core: &Core) -> Error {
    loop {
        core.unwritten().await;
        if let Err(error) = poll_fn(|context| core.poll_write(context)).await {
            return error;
        }
    }
}

async fn next<R: AsyncRead + Unpin>(read: &mut FramedRead<R, Codec>) -> Result<Message, Error> {
    match read.next().await {
        Some(Ok(message)) => Ok(message),
        Some(Err(error @ FrameError::Length(_))) => Err(Error::Protocol(error.to_string())),
        // In the middle of a message.
        Some(Err(FrameError::Read(error))) => Err(lost(Arc::new(error))),
        None => Err(Error::Closed),
    }
}

fn lost(error: Arc<std::io::Error>) -> Error {
    Error::Lost(error)
}

fn agree(name: &str, first: &Message) -> Result<Version, Error> {
    match first.kind {
        kind::HELLO => {
            let theirs = first.offers();
            Versions::OURS
                .newest_common(theirs)
                .ok_or(Error::Versions { theirs })
        }
        kind::ERROR => Err(Error::RefusedConnection(Refusal::read(first))),
        kind => Err(Error::NoSwitch {
            socket: name.to_owned(),
            kind,
        }),
    }
}

#[cfg(test)]
#[path = "switch_tests.rs"]
mod tests;
