//! The protocol (QEMU's docs/interop/qmp-spec): JSON objects, one a line.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use futures::StreamExt as _;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _};
use tokio::time::timeout;
use tokio_util::codec::Framed;

use crate::signals::Counts;
use crate::signals::follow::SourceError;
use crate::signals::lines::{Line, Lines};
use crate::time::Nanos;

/// A monitor that serves somebody else lets others wait; and QEMU's main loop may be busy for a while.
const DEADLINE: Duration = Duration::from_secs(10);
/// The longest replies here are below a kilobyte.
const LONGEST: usize = 65_536;
/// Events that are kept while a reply is awaited.
const MOST_WAITING: usize = 1024;

/// One end of a monitor.
#[derive(Debug)]
pub(super) struct Client<S> {
    stream: Framed<S, Lines>,
    /// Of the next command.
    id: u64,
    /// That came while a reply was awaited.
    waiting: VecDeque<Event>,
    counts: Arc<Counts>,
}

/// An event. Which there are is for QEMU to say.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Event {
    pub(super) name: String,
    pub(super) data: Option<Value>,
    /// None if the host's clock could not be read.
    pub(super) at: Option<Nanos>,
}

/// Anything that a server sends: what it has tells what it is.
#[derive(Debug, Deserialize)]
struct Message {
    #[serde(rename = "QMP")]
    greeting: Option<Value>,
    event: Option<String>,
    data: Option<Value>,
    timestamp: Option<Timestamp>,
    #[serde(rename = "return")]
    reply: Option<Value>,
    error: Option<Failure>,
    id: Option<Value>,
}

/// Both are -1 if there is no time.
#[derive(Debug, Deserialize)]
struct Timestamp {
    seconds: i64,
    microseconds: i64,
}

#[derive(Debug, Deserialize)]
struct Failure {
    class: String,
    desc: String,
}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Client<S> {
    /// Waits for the greeting and leaves the mode in which a monitor tells nothing.
    pub(super) async fn negotiate(stream: S, counts: Arc<Counts>) -> Result<Self, SourceError> {
        let mut client = Self {
            stream: Framed::new(stream, Lines::new(LONGEST)),
            id: 0,
            waiting: VecDeque::new(),
            counts,
        };
        let first = timeout(DEADLINE, client.message());
        let first = first.await.map_err(|_| SourceError::Deadline(DEADLINE))?;
        if first?.greeting.is_none() {
            return Err(SourceError::Qmp("it does not greet".to_owned()));
        }
        client.execute("qmp_capabilities", json!({})).await?;
        Ok(client)
    }

    /// Executes a command, and returns what it returns. One that is cancelled may be executed all the same.
    pub(super) async fn execute(
        &mut self,
        command: &str,
        arguments: Value,
    ) -> Result<Value, SourceError> {
        let reply = timeout(DEADLINE, self.exchange(command, arguments));
        reply.await.map_err(|_| SourceError::Deadline(DEADLINE))?
    }

    /// The next event.
    pub(super) async fn event(&mut self) -> Result<Event, SourceError> {
        if let Some(event) = self.waiting.pop_front() {
            return Ok(event);
        }
        loop {
            if let Some(event) = self.message().await?.into_event() {
                return Ok(event);
            }
        }
    }

    async fn exchange(&mut self, command: &str, arguments: Value) -> Result<Value, SourceError> {
        self.id += 1;
        let id = json!(self.id);
        let request = json!({"execute": command, "arguments": arguments, "id": id});
        let stream = self.stream.get_mut();
        stream
            .write_all(format!("{request}\r\n").as_bytes())
            .await?;
        stream.flush().await?;
        loop {
            let message = self.message().await?;
            // A reply to a command that was cancelled is nobody's.
            if message.id.as_ref() == Some(&id) {
                return match (message.reply, message.error) {
                    (Some(reply), _) => Ok(reply),
                    (None, Some(Failure { class, desc })) => {
                        Err(SourceError::Qmp(format!("{command}: {desc} ({class})")))
                    }
                    (None, None) => Err(SourceError::Qmp(format!("{command}: no reply in it"))),
                };
            }
            if let Some(event) = message.into_event()
                && self.waiting.len() < MOST_WAITING
            {
                self.waiting.push_back(event);
            }
        }
    }

    /// The next message that can be read. Cancel safe.
    async fn message(&mut self) -> Result<Message, SourceError> {
        loop {
            let line = match self.stream.next().await {
                Some(line) => line?,
                None => return Err(SourceError::Ended("the monitor was closed".to_owned())),
            };
            let message = match &line {
                Line::Whole(line) => serde_json::from_slice(line).ok(),
                Line::TooLong => None,
            };
            if let Some(message) = message {
                return Ok(message);
            }
            self.counts.malformed.fetch_add(1, Relaxed);
            tracing::debug!(?line, "not a message of QMP");
        }
    }
}

impl Message {
    fn into_event(self) -> Option<Event> {
        Some(Event {
            name: self.event?,
            data: self.data,
            at: self.timestamp.and_then(Timestamp::nanos),
        })
    }
}

impl Timestamp {
    fn nanos(self) -> Option<Nanos> {
        let micros = u32::try_from(self.microseconds).ok()?;
        Nanos::from_parts(u64::try_from(self.seconds).ok()?, micros.checked_mul(1000)?)
    }
}
