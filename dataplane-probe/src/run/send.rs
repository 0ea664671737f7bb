//! The sending thread.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};

use super::callee::Link;
use super::events::{Event, Sink};
use super::{Config, Flag, raised};
use crate::clock::{MICROSECOND, MILLISECOND, monotonic_ns, nanos, sleep_until};
use crate::pace::{LatenessLog, Schedule, micros_u32};
use crate::packets::{Newest, Sending as Logged};
use crate::sys;
use crate::wire::{Body, Data, Packet};

/// More times of lateness than this are not kept one by one.
const KEPT_OVERDUE: usize = 1 << 16;

/// The thread, and how far it is.
#[derive(Debug)]
pub(super) struct Sending {
    stop: Flag,
    sent: Arc<AtomicU64>,
    thread: Option<JoinHandle<Sent>>,
}

/// What it did.
#[derive(Debug)]
pub(super) struct Sent {
    pub(super) count: u64,
    pub(super) lateness: LatenessLog,
    /// Times in which packets were due and none was sent, wall clock.
    pub(super) overdue: Vec<(u64, u64)>,
    pub(super) errors: u64,
    /// Those of the errors that are no outage but a shortage of the client's own.
    pub(super) shortages: u64,
    pub(super) error: Option<io::Error>,
    pub(super) realtime: bool,
    /// Every packet, if they are wanted.
    pub(super) log: Option<Newest<Logged>>,
}

struct Sender {
    config: Config,
    session: u64,
    link: Arc<Link>,
    schedule: Schedule,
    started_ns: u64,
    sink: Sink,
}

impl Sending {
    pub(super) fn start(
        config: &Config,
        session: u64,
        link: Arc<Link>,
        schedule: Schedule,
        started_ns: u64,
        sink: Sink,
    ) -> io::Result<Self> {
        let stop = Flag::default();
        let sent = Arc::new(AtomicU64::new(0));
        let sender = Sender {
            config: config.clone(),
            session,
            link,
            schedule,
            started_ns,
            sink,
        };
        let (stop_seen, progress) = (Arc::clone(&stop), Arc::clone(&sent));
        let thread = thread::Builder::new()
            .name("probe-send".into())
            .spawn(move || sender.run(&stop_seen, &progress))?;
        Ok(Self {
            stop,
            sent,
            thread: Some(thread),
        })
    }

    pub(super) fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    pub(super) fn is_over(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    pub(super) fn stop(&mut self) -> Sent {
        self.stop.store(true, Ordering::Relaxed);
        let outcome = self.thread.take().and_then(|thread| thread.join().ok());
        outcome.unwrap_or_else(|| Sent {
            count: self.sent(),
            errors: 1,
            shortages: 1,
            error: Some(io::Error::other("the sending thread died")),
            ..Sent::new(0, false)
        })
    }
}

impl Drop for Sending {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

impl Sent {
    fn new(bound_us: u64, realtime: bool) -> Self {
        let lateness = LatenessLog::new(bound_us);
        Self {
            count: 0,
            lateness,
            overdue: Vec::new(),
            errors: 0,
            shortages: 0,
            error: None,
            realtime,
            log: None,
        }
    }
}

impl Sender {
    fn run(self, stop: &Flag, progress: &AtomicU64) -> Sent {
        sys::prompt_timers();
        let realtime = self.config.realtime && sys::prefer_this_thread(sys::PACKETS);
        let mut outcome = Sent::new(nanos(self.config.max_late) / MICROSECOND, realtime);
        outcome.log = self.config.log.then(Newest::default);
        let period_ns = self.config.period_ns();
        let total = self
            .config
            .duration
            .map_or(u64::MAX, |duration| nanos(duration).div_ceil(period_ns));
        let notable_ns = period_ns.max(MILLISECOND);
        let mut bytes = vec![0; self.config.packet_bytes];
        let mut behind_before_ns = 0;
        for sequence in 0..total {
            let due_ns = self.schedule.due_ns(sequence);
            sleep_until(due_ns);
            if raised(stop) {
                break;
            }
            let behind_ns = monotonic_ns().saturating_sub(due_ns);
            let late_us = micros_u32(behind_ns);
            let data = Data {
                sequence,
                intended_ns: due_ns,
                late_us,
            };
            Packet {
                session: self.session,
                body: Body::ToVm(data),
            }
            .encode(&mut bytes);
            if let Err(error) = self.send(&bytes) {
                outcome.errors += 1;
                if !sys::is_outage(&error) {
                    outcome.shortages += 1;
                    outcome.error.get_or_insert(error);
                }
            }
            outcome.count = sequence + 1;
            progress.store(outcome.count, Ordering::Relaxed);
            outcome.lateness.record_n(u64::from(late_us), 1);
            let intended_ns = self.started_ns + sequence * period_ns;
            // Those that follow in the same burst were overdue in the same time.
            if behind_ns > notable_ns
                && behind_ns > behind_before_ns
                && outcome.overdue.len() < KEPT_OVERDUE
            {
                outcome.overdue.push((intended_ns, intended_ns + behind_ns));
            }
            behind_before_ns = behind_ns;
            if let Some(log) = &mut outcome.log {
                log.push(Logged {
                    sequence,
                    at_ns: intended_ns + behind_ns,
                    late_us,
                });
            }
            self.sink.send(|| Event::Sent {
                seq: sequence,
                due_ns: intended_ns,
                late_us,
            });
        }
        outcome
    }

    /// An error left behind by an ICMP answer to an earlier packet is reported by the next call instead of sending:
    /// that says nothing about this packet, which deserves its own attempt.
    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        self.link.send(bytes).or_else(|_| self.link.send(bytes))
    }
}
