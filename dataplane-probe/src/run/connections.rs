//! New connections at a fixed rate; a slow one never delays the next.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use hdrhistogram::Histogram;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};

use super::Clock;
use super::events::{Event, Sink};
use crate::pace::histogram_us;
use crate::wire::{GREETING, Greeting, Role};

/// How they went.
#[derive(Debug)]
pub(super) struct Outcome {
    pub(super) every: Duration,
    pub(super) timeout: Duration,
    pub(super) attempted: u64,
    pub(super) timed_out: u64,
    pub(super) refused: u64,
    pub(super) reset: u64,
    pub(super) other: u64,
    pub(super) failures_ns: Option<(u64, u64)>,
    pub(super) error: Option<String>,
    pub(super) latency: Histogram<u64>,
}

/// How one went.
struct Attempt {
    due_ns: u64,
    took: Duration,
    result: Result<(), Failure>,
}

/// Why one failed.
pub(crate) enum Failure {
    TimedOut,
    Refused(io::Error),
    Reset(io::Error),
    Other(io::Error),
}

pub(super) async fn run(
    target: SocketAddr,
    session: u64,
    every: Duration,
    timeout: Duration,
    clock: Clock,
    mut stopped: watch::Receiver<bool>,
    sink: Sink,
) -> Outcome {
    let mut outcome = Outcome {
        every,
        timeout,
        attempted: 0,
        timed_out: 0,
        refused: 0,
        reset: 0,
        other: 0,
        failures_ns: None,
        error: None,
        latency: histogram_us(),
    };
    let mut running = JoinSet::new();
    for number in 0.. {
        let due = clock.due(number, every);
        let stop = timeout_at(due, stopped.wait_for(|stop| *stop))
            .await
            .is_ok();
        while let Some(done) = running.try_join_next() {
            outcome.enter(done.ok(), &sink);
        }
        if stop {
            break;
        }
        outcome.attempted += 1;
        running.spawn(attempt(
            target,
            session,
            due,
            clock.due_ns(number, every),
            timeout,
        ));
    }
    // Each ends by its own timeout.
    while let Some(done) = running.join_next().await {
        outcome.enter(done.ok(), &sink);
    }
    outcome
}

async fn attempt(
    target: SocketAddr,
    session: u64,
    due: Instant,
    due_ns: u64,
    timeout: Duration,
) -> Attempt {
    let greeted = async { greet(TcpStream::connect(target).await?, session).await };
    let result = timeout_at(due + timeout, greeted)
        .await
        .unwrap_or(Err(Failure::TimedOut));
    Attempt {
        due_ns,
        took: due.elapsed(),
        result,
    }
}

/// Greets over a new connection, and waits for the answer.
pub(crate) async fn greet(mut connection: TcpStream, session: u64) -> Result<(), Failure> {
    let greeting = Greeting {
        role: Role::Connect,
        session,
    }
    .encode();
    connection
        .write_all(&greeting)
        .await
        .map_err(Failure::Reset)?;
    let mut answer = [0; GREETING];
    connection
        .read_exact(&mut answer)
        .await
        .map_err(Failure::Reset)?;
    if answer == greeting {
        Ok(())
    } else {
        Err(Failure::Other(io::Error::other("the answer was altered")))
    }
}

/// Of connecting.
impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::ConnectionRefused => Self::Refused(error),
            io::ErrorKind::TimedOut => Self::TimedOut,
            _ => Self::Other(error),
        }
    }
}

impl Outcome {
    fn enter(&mut self, attempt: Option<Attempt>, sink: &Sink) {
        // None if the task panicked, which the runtime has reported.
        let Some(attempt) = attempt else {
            self.other += 1;
            return;
        };
        let took_us = u64::try_from(attempt.took.as_micros()).unwrap_or(u64::MAX);
        let error = match attempt.result {
            Ok(()) => None,
            Err(Failure::TimedOut) => {
                self.timed_out += 1;
                Some(format!("no answer within {} ms", self.timeout.as_millis()))
            }
            Err(Failure::Refused(error)) => {
                self.refused += 1;
                Some(error.to_string())
            }
            Err(Failure::Reset(error)) => {
                self.reset += 1;
                Some(error.to_string())
            }
            Err(Failure::Other(error)) => {
                self.other += 1;
                Some(error.to_string())
            }
        };
        if let Some(error) = &error {
            let (first, last) = self.failures_ns.unwrap_or((attempt.due_ns, attempt.due_ns));
            self.failures_ns = Some((first.min(attempt.due_ns), last.max(attempt.due_ns)));
            self.error.get_or_insert_with(|| error.clone());
        } else {
            self.latency.saturating_record(took_us);
        }
        sink.send(|| Event::Connection {
            due_ns: attempt.due_ns,
            took_us,
            error,
        });
    }

    pub(super) fn failed(&self) -> u64 {
        self.timed_out + self.refused + self.reset + self.other
    }
}
