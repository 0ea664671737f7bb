//! The receiving thread, and what it has seen.

use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use hdrhistogram::Histogram;

use super::callee::Link;
use super::events::{Event, Sink};
use super::{Config, Flag, raised};
use crate::clock::{MICROSECOND, realtime_ns};
use crate::gaps::Arrivals;
use crate::ledger::{Arrival, Ledger};
use crate::pace::histogram_us;
use crate::packets::{Heard, Newest};
use crate::remote::{RemoteArrivals, Snapshot};
use crate::sys::{Batch, PACKETS, Wait, prefer_this_thread};
use crate::wire::{Body, Data, MAX_PACKET, Packet, Received};

/// Jumps of the sequence number beyond this many are not kept: their losses have no time of day then.
const KEPT_JUMPS: usize = 1 << 16;

/// The thread, and what it shares.
#[derive(Debug)]
pub(super) struct Receiving {
    stop: Flag,
    state: Arc<Mutex<State>>,
    thread: Option<JoinHandle<()>>,
}

/// What has been received.
#[derive(Debug, Clone)]
pub(super) struct State {
    session: u64,
    period_ns: u64,
    pub(super) ledger: Ledger,
    pub(super) arrivals: Arrivals,
    /// Set once it is known when the client's first packet is due.
    pub(super) remote: Option<RemoteArrivals>,
    /// When the reflector was told to begin, and when it was known to be sending last; wall clock.
    pub(super) from_vm_ns: (u64, Option<u64>),
    to_vm_started_ns: u64,
    /// The highest sequence number of which the round trip is known.
    timed: Option<u64>,
    pub(super) jumps: Vec<Jump>,
    pub(super) between: Histogram<u64>,
    pub(super) round_trip: Histogram<u64>,
    pub(super) foreign: u64,
    overflow_base: Option<u32>,
    pub(super) overflow: u32,
    /// Every copy, if they are wanted.
    pub(super) log: Option<Newest<Heard>>,
}

/// The sequence number rose by more than one.
#[derive(Debug, Clone, Copy)]
pub(super) struct Jump {
    /// The first that did not come in its turn.
    pub(super) first: u64,
    /// The one that came instead.
    pub(super) next: u64,
    /// The arrival before.
    pub(super) before_ns: u64,
    /// Its arrival.
    pub(super) after_ns: u64,
}

impl Receiving {
    pub(super) fn start(
        config: &Config,
        session: u64,
        link: Arc<Link>,
        sink: Sink,
    ) -> io::Result<Self> {
        let state = Arc::new(Mutex::new(State::new(config, session)));
        let stop = Flag::default();
        let (shared, stop_seen, realtime) =
            (Arc::clone(&state), Arc::clone(&stop), config.realtime);
        let thread = thread::Builder::new()
            .name("probe-receive".into())
            .spawn(move || {
                if realtime {
                    prefer_this_thread(PACKETS);
                }
                receive(&link, &shared, &stop_seen, &sink);
            })?;
        Ok(Self {
            stop,
            state,
            thread: Some(thread),
        })
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// The client's first packet is due at `started_ns`.
    pub(super) fn expect_to_vm(&self, started_ns: u64) {
        let mut state = self.state();
        state.to_vm_started_ns = started_ns;
        state.remote = Some(RemoteArrivals::every(state.period_ns, started_ns));
    }

    /// The reflector was sending until `until_ns` at least. The first word on it counts.
    pub(super) fn expect_from_vm(&self, until_ns: u64) {
        self.state().from_vm_ns.1.get_or_insert(until_ns);
    }

    pub(super) fn stop(&mut self) -> State {
        self.end();
        self.state().clone()
    }

    fn end(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has said so; what it had seen is in the state.
            let _ = thread.join();
        }
    }
}

impl Drop for Receiving {
    fn drop(&mut self) {
        self.end();
    }
}

impl State {
    fn new(config: &Config, session: u64) -> Self {
        let period_ns = config.period_ns();
        Self {
            session,
            period_ns,
            ledger: Ledger::default(),
            arrivals: Arrivals::every(period_ns),
            remote: None,
            from_vm_ns: (realtime_ns(), None),
            to_vm_started_ns: 0,
            timed: None,
            jumps: Vec::new(),
            between: histogram_us(),
            round_trip: histogram_us(),
            foreign: 0,
            overflow_base: None,
            overflow: 0,
            log: config.log.then(Newest::default),
        }
    }

    /// How many packets the reflector had received when it last told.
    pub(super) fn reflector_received(&self) -> u64 {
        self.remote
            .as_ref()
            .and_then(RemoteArrivals::newest)
            .map_or(0, |snapshot| snapshot.count)
    }

    /// Enters a datagram; true if it is the session's.
    fn datagram(&mut self, bytes: &[u8], at_ns: u64, sink: &Sink) -> bool {
        match Packet::decode(bytes) {
            Ok(Packet {
                session,
                body: Body::FromVm(data, received),
            }) if session == self.session => {
                self.packet(&data, &received, at_ns, sink);
                true
            }
            // Greetings are answered as often as they were sent.
            Ok(Packet {
                session,
                body: Body::Welcome,
            }) if session == self.session => true,
            _ => {
                self.foreign += 1;
                false
            }
        }
    }

    fn packet(&mut self, data: &Data, received: &Received, at_ns: u64, sink: &Sink) {
        let next = self.ledger.highest().map_or(0, |highest| highest + 1);
        let arrival = self.ledger.record(data.sequence);
        if arrival == Arrival::Absurd {
            self.foreign += 1;
            return;
        }
        if let Some(log) = &mut self.log {
            log.push(Heard {
                sequence: data.sequence,
                host_ns: at_ns,
                remote_ns: data
                    .intended_ns
                    .saturating_add(u64::from(data.late_us) * MICROSECOND),
                late_us: data.late_us,
            });
        }
        sink.send(|| Event::Received {
            seq: data.sequence,
            at_ns,
            late_us: data.late_us,
            duplicate: arrival == Arrival::Duplicate,
            to_vm_received: received.count,
            to_vm_highest: received.highest,
        });
        if !matches!(arrival, Arrival::InOrder | Arrival::Reordered) {
            return;
        }
        if next == 0 && data.sequence > 0 {
            self.arrivals.expected_since(self.from_vm_ns.0);
        }
        let before_ns = self.arrivals.last_ns();
        if let Some(between_ns) = self.arrivals.arrived(at_ns, data.late_us) {
            self.between.saturating_record(between_ns / MICROSECOND);
        }
        if data.sequence > next && self.jumps.len() < KEPT_JUMPS {
            let before_ns = before_ns.unwrap_or(self.from_vm_ns.0);
            self.jumps.push(Jump {
                first: next,
                next: data.sequence,
                before_ns,
                after_ns: at_ns,
            });
        }
        self.snapshot(data, received, at_ns);
    }

    fn snapshot(&mut self, data: &Data, received: &Received, at_ns: u64) {
        let nanos = |micros: u32| u64::from(micros) * MICROSECOND;
        let last_age_ns = received.last_age_us.map_or(0, nanos);
        let snapshot = Snapshot {
            host_ns: at_ns,
            sequence: data.sequence,
            remote_ns: data.intended_ns + nanos(data.late_us),
            count: received.count,
            highest: received.highest,
            last_age_ns,
            first_new_age_ns: received.first_new_age_us.map(nanos),
            inner_gap_ns: nanos(received.inner_gap_us),
        };
        let Some(remote) = &mut self.remote else {
            return;
        };
        remote.observe(snapshot);
        if received.count > 0 && self.timed.is_none_or(|timed| received.highest > timed) {
            self.timed = Some(received.highest);
            let due_ns = self.to_vm_started_ns + received.highest.saturating_mul(self.period_ns);
            let trip_ns = at_ns.saturating_sub(last_age_ns).saturating_sub(due_ns);
            self.round_trip.saturating_record(trip_ns / MICROSECOND);
        }
    }

    fn see_overflow(&mut self, count: Option<u32>) {
        let count = count.unwrap_or(0);
        let base = *self.overflow_base.get_or_insert(count);
        self.overflow = count.wrapping_sub(base);
    }
}

fn receive(link: &Link, state: &Mutex<State>, stop: &Flag, sink: &Sink) {
    let mut batch = Batch::new(MAX_PACKET);
    while !raised(stop) {
        let count = match batch.receive(link.socket.as_fd(), Wait::UntilTimeout) {
            Ok(count) => count,
            // The timeout, by which the flag is looked at.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            // Left by an ICMP answer to a packet sent. At real-time priority a loop must never spin, whatever it is.
            Err(_) => {
                thread::sleep(Duration::from_millis(1));
                continue;
            }
        };
        let now_ns = realtime_ns();
        let mut state = lock(state);
        for datagram in batch.datagrams(count) {
            state.see_overflow(datagram.overflow);
            let at_ns = datagram.stamp_ns.unwrap_or(now_ns);
            if state.datagram(datagram.bytes, at_ns, sink) {
                link.heard(datagram.from, at_ns);
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
