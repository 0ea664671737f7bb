//! The long TCP stream: numbered records at a fixed rate, echoed.

use std::io;
use std::net::TcpStream as StdStream;
use std::os::fd::AsFd;
use std::time::Duration;

use hdrhistogram::Histogram;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout_at};

use super::Clock;
use super::events::{Event, Sink};
use crate::clock::{MICROSECOND, nanos, realtime_ns};
use crate::gaps::Arrivals;
use crate::pace::histogram_us;
use crate::sys::total_retransmits;

/// Bytes of a record: its number, eight times, so that a shifted or torn stream cannot look right.
pub(super) const RECORD: usize = 64;
/// The echo of the last records is waited for at least this long: after an outage TCP tries again only now and then.
const PATIENCE: Duration = Duration::from_secs(5);

/// How it went.
#[derive(Debug)]
pub(super) struct Outcome {
    pub(super) period_ns: u64,
    pub(super) error: Option<String>,
    pub(super) sent: u64,
    pub(super) echoed: u64,
    pub(super) arrivals: Arrivals,
    pub(super) round_trip: Histogram<u64>,
    pub(super) retransmits: u64,
}

struct Reader {
    half: OwnedReadHalf,
    every: Duration,
    clock: Clock,
    sink: Sink,
    expected: u64,
    partial: Vec<u8>,
    outcome: Outcome,
}

pub(super) async fn run(
    socket: StdStream,
    every: Duration,
    drain: Duration,
    clock: Clock,
    mut stopped: watch::Receiver<bool>,
    sink: Sink,
) -> Outcome {
    let period_ns = nanos(every);
    let mut outcome = Outcome {
        period_ns,
        error: None,
        sent: 0,
        echoed: 0,
        // A pause may be hardly longer than the time between two records.
        arrivals: Arrivals::above(period_ns),
        round_trip: histogram_us(),
        retransmits: 0,
    };
    let (read, write) = match split(socket) {
        Ok(halves) => halves,
        Err(error) => {
            outcome.error = Some(error.to_string());
            return outcome;
        }
    };
    outcome.arrivals.expected_since(clock.begin_ns);
    let mut reader = Reader {
        half: read,
        every,
        clock,
        sink,
        expected: 0,
        partial: Vec::new(),
        outcome,
    };
    let writing = write_records(write, every, clock, stopped.clone());
    tokio::pin!(writing);
    let mut written = None;
    let mut deadline = None;
    let broken = loop {
        // All of it is back: how the two sides close is nobody's connection any more.
        if let Some((sent, None, _)) = &written
            && reader.outcome.echoed >= *sent
        {
            break None;
        }
        tokio::select! {
            result = &mut writing, if written.is_none() => written = Some(result),
            result = reader.read() => match result {
                Ok(true) => {}
                Ok(false) => break None,
                Err(error) => break Some(error),
            },
            _ = stopped.changed(), if deadline.is_none() => deadline = Some(Instant::now() + drain.max(PATIENCE)),
            () = until(deadline) => break Some(io::Error::other("records were still missing at the end")),
        }
    };
    reader.conclude(broken, written)
}

fn split(socket: StdStream) -> io::Result<(OwnedReadHalf, OwnedWriteHalf)> {
    socket.set_nonblocking(true)?;
    Ok(TcpStream::from_std(socket)?.into_split())
}

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

/// Writes until told to stop; returns the bytes written, what went wrong, and the half, which closes when dropped.
async fn write_records(
    mut half: OwnedWriteHalf,
    every: Duration,
    clock: Clock,
    mut stopped: watch::Receiver<bool>,
) -> (u64, Option<io::Error>, OwnedWriteHalf) {
    for number in 0_u64.. {
        let due = clock.due(number, every);
        // Returns early only when the run ends.
        if timeout_at(due, stopped.wait_for(|stop| *stop))
            .await
            .is_ok()
        {
            let closed = half.shutdown().await.err();
            return (number * RECORD as u64, closed, half);
        }
        let record = [number.to_be_bytes(); RECORD / 8].concat();
        let result = tokio::select! {
            // First: one that is due when the run ends still fits in, and the stream is closed after it.
            biased;
            result = half.write_all(&record) => result,
            // A peer that takes nothing more must not hold up the end of the run.
            _ = stopped.wait_for(|stop| *stop) => Err(io::Error::other("the stream was blocked at the end")),
        };
        if let Err(error) = result {
            return (number * RECORD as u64, Some(error), half);
        }
    }
    (0, None, half)
}

impl Reader {
    /// Takes what is there; false at the end of the stream.
    async fn read(&mut self) -> io::Result<bool> {
        let mut buffer = [0; 4096];
        let read = self.half.read(&mut buffer).await?;
        if read == 0 {
            return Ok(false);
        }
        let now_ns = realtime_ns();
        self.sink.send(|| Event::Echo {
            at_ns: now_ns,
            bytes: read,
        });
        self.outcome.arrivals.arrived(now_ns, 0);
        self.outcome.echoed += read as u64;
        self.partial.extend_from_slice(&buffer[..read]);
        let whole = self.partial.len() / RECORD * RECORD;
        for record in self.partial[..whole].chunks_exact(RECORD) {
            if record
                .chunks_exact(8)
                .any(|number| number != self.expected.to_be_bytes())
            {
                return Err(io::Error::other(format!(
                    "record {} came back altered",
                    self.expected
                )));
            }
            let due_ns = self.clock.due_ns(self.expected, self.every);
            self.outcome
                .round_trip
                .saturating_record(now_ns.saturating_sub(due_ns) / MICROSECOND);
            self.expected += 1;
        }
        self.partial.drain(..whole);
        Ok(true)
    }

    fn conclude(
        self,
        broken: Option<io::Error>,
        written: Option<(u64, Option<io::Error>, OwnedWriteHalf)>,
    ) -> Outcome {
        let mut outcome = self.outcome;
        outcome.retransmits = total_retransmits(self.half.as_ref().as_fd()).unwrap_or(0);
        let (sent, write_error, ended_early) = match written {
            Some((sent, error, _half)) => (sent, error, None),
            // It ended before it was told to.
            None => (
                outcome.echoed,
                None,
                Some(io::Error::other("the reflector closed the stream")),
            ),
        };
        outcome.sent = sent;
        // What kept it from being written comes before what was therefore not read.
        let error = write_error.or(broken).or(ended_early);
        let missing = sent.saturating_sub(outcome.echoed);
        if missing > 0 {
            outcome.arrivals.missing_until(realtime_ns());
        }
        outcome.error = match error {
            Some(error) => Some(error.to_string()),
            None if missing > 0 => Some(format!("closed with {missing} bytes missing")),
            None => None,
        };
        outcome
    }
}
