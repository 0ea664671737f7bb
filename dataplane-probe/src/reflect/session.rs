//! Sessions: what each has received and sent.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use socket2::SockAddr;

use super::{IDLE, MAX_SESSIONS, RESCHEDULE, lock};
use crate::clock::{MICROSECOND, MILLISECOND, monotonic_ns, nanos};
use crate::control::{Attempts, Connections, Finished};
use crate::gaps::Arrivals;
use crate::ledger::{Arrival, Ledger};
use crate::pace::{LatenessLog, Schedule, micros_u32};
use crate::packets::{Newest, RemoteLog};
use crate::sys;
use crate::wire::{Body, Data, MAX_PACKET, MIN_PACKET, Packet, Received};

/// Nothing is sent to a client that has been silent for this long: it has most likely gone without a word, and a slow
/// machine has better things to do. Sending goes on when it is heard of again.
const SILENCE_NS: u64 = 30_000 * MILLISECOND;
/// How often it is looked whether it is.
const LOOK_AGAIN_NS: u64 = 100 * MILLISECOND;
/// Time for the thread that sends to notice that it should.
const START_IN_NS: u64 = 10 * MILLISECOND;
/// The shortest period, 20 kHz: twice what is promised.
const MIN_PERIOD_NS: u64 = 50_000;
/// The longest period.
const MAX_PERIOD_NS: u64 = 10_000_000_000;

/// The sockets to send from, one for each address served.
#[derive(Debug, Default, Clone)]
pub(super) struct Sockets(Vec<(SocketAddr, Arc<UdpSocket>)>);

/// All sessions.
#[derive(Debug, Default)]
pub(super) struct Sessions {
    open: Mutex<HashMap<u64, Arc<Session>>>,
    /// Grows whenever a session begins to send, or goes.
    generation: AtomicU64,
}

/// What a client asks a session to be.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted {
    pub(super) id: u64,
    pub(super) period_ns: u64,
    pub(super) packet_bytes: usize,
    pub(super) log: bool,
}

/// One session.
#[derive(Debug)]
pub(super) struct Session {
    id: u64,
    period_ns: u64,
    packet_bytes: usize,
    /// The address that the client knows this machine by.
    source: IpAddr,
    socket: Arc<UdpSocket>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    peer: Option<SocketAddr>,
    /// The last sign of life of the client.
    touched_ns: u64,
    ledger: Ledger,
    arrivals: Arrivals,
    first_new_ns: Option<u64>,
    inner_gap_ns: u64,
    overflow_base: Option<u32>,
    overflow: u32,
    sender: Sender,
    stream_retransmits: Option<u64>,
    /// Whom it calls, if it does.
    call: Option<Call>,
    /// Every packet, if the client wants to know.
    log: Option<Log>,
}

/// Sequence numbers and times, on this machine's clock.
#[derive(Debug, Default)]
struct Log {
    arrivals: Newest<(u64, u64)>,
    sent: Newest<(u64, u64)>,
}

/// What the machine itself opens.
#[derive(Debug)]
struct Call {
    to: SocketAddr,
    /// The stream was dialled.
    dialled: bool,
    connections: Option<Connections>,
    attempts: Option<Attempts>,
}

#[derive(Debug)]
struct Sender {
    /// While it sends.
    schedule: Option<Schedule>,
    /// It never will again.
    stopped: bool,
    sent: u64,
    errors: u64,
    shortages: u64,
    lateness: LatenessLog,
    rescheduled: u64,
    longest_reschedule_ns: u64,
}

impl Sockets {
    pub(super) fn add(&mut self, socket: &Arc<UdpSocket>) -> io::Result<()> {
        self.0.push((socket.local_addr()?, Arc::clone(socket)));
        Ok(())
    }

    /// The one that serves packets to `local`.
    fn serving(&self, local: IpAddr) -> Option<Arc<UdpSocket>> {
        let fits = |address: &SocketAddr| address.ip() == local;
        let serves_all = |address: &SocketAddr| {
            address.ip().is_unspecified() && address.is_ipv4() == local.is_ipv4()
        };
        let found = self.0.iter().find(|(address, _)| fits(address));
        found
            .or_else(|| self.0.iter().find(|(address, _)| serves_all(address)))
            .map(|(_, socket)| Arc::clone(socket))
    }
}

impl Sessions {
    /// Changes when the answer of [`Sessions::sending_from`] may.
    pub(super) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// The sessions that send from this socket.
    pub(super) fn sending_from(&self, socket: &Arc<UdpSocket>) -> Vec<Arc<Session>> {
        let sends = |session: &&Arc<Session>| {
            Arc::ptr_eq(&session.socket, socket) && lock(&session.state).sender.schedule.is_some()
        };
        lock(&self.open).values().filter(sends).cloned().collect()
    }

    pub(super) fn start(&self, session: &Session) -> Result<(), String> {
        session.start()?;
        self.generation.fetch_add(1, Ordering::AcqRel);
        Ok(())
    }

    pub(super) fn get(&self, id: u64) -> Option<Arc<Session>> {
        lock(&self.open).get(&id).cloned()
    }

    /// Begins a session; again if it exists with the same parameters, so that the request can be repeated.
    pub(super) fn open(
        &self,
        wanted: Wanted,
        source: IpAddr,
        sockets: &Sockets,
    ) -> Result<(), String> {
        let Wanted {
            id,
            period_ns,
            packet_bytes,
            log,
        } = wanted;
        if !(MIN_PERIOD_NS..=MAX_PERIOD_NS).contains(&period_ns) {
            return Err(format!(
                "a period of {period_ns} ns is not between 50 µs and 10 s"
            ));
        }
        if !(MIN_PACKET..=MAX_PACKET).contains(&packet_bytes) {
            return Err(format!(
                "{packet_bytes} bytes are not between {MIN_PACKET} and {MAX_PACKET}"
            ));
        }
        let socket = sockets
            .serving(source)
            .ok_or_else(|| format!("UDP is not served on {source}"))?;
        self.expire();
        let mut sessions = lock(&self.open);
        if sessions.contains_key(&id) {
            return Ok(());
        }
        if sessions.len() >= MAX_SESSIONS {
            return Err(format!(
                "{MAX_SESSIONS} sessions are open, which is all there can be; one that is silent for {} s is forgotten",
                IDLE.as_secs()
            ));
        }
        tracing::info!(session = %format_args!("{id:016x}"), %source, period_ns, packet_bytes, "session opened");
        let state = Mutex::new(State::new(period_ns, log));
        sessions.insert(
            id,
            Arc::new(Session {
                id,
                period_ns,
                packet_bytes,
                source,
                socket,
                state,
            }),
        );
        Ok(())
    }

    pub(super) fn close(&self, id: u64) {
        if let Some(session) = lock(&self.open).remove(&id) {
            session.stop();
            self.generation.fetch_add(1, Ordering::AcqRel);
            tracing::info!(session = %format_args!("{id:016x}"), "session closed");
        }
    }

    /// Forgets sessions whose client has gone.
    pub(super) fn expire(&self) {
        let now_ns = monotonic_ns();
        lock(&self.open).retain(|id, session| {
            let idle_ns = now_ns.saturating_sub(lock(&session.state).touched_ns);
            let keep = idle_ns < nanos(IDLE);
            if !keep {
                session.stop();
                self.generation.fetch_add(1, Ordering::AcqRel);
                tracing::info!(session = %format_args!("{id:016x}"), "session forgotten: its client is silent");
            }
            keep
        });
    }
}

impl Session {
    /// Enters a packet that arrived at `at_ns` (this machine's monotonic clock) and answers a greeting.
    pub(super) fn received(&self, body: Body, from: SocketAddr, at_ns: u64, overflow: Option<u32>) {
        let mut state = lock(&self.state);
        state.touched_ns = state.touched_ns.max(at_ns);
        state.peer = Some(from);
        state.see_overflow(overflow);
        match body {
            Body::Hello => {
                drop(state);
                self.welcome(from);
            }
            Body::ToVm(data) => state.arrived(data.sequence, at_ns),
            Body::Welcome | Body::FromVm(..) => {}
        }
    }

    /// Begins to send, once.
    fn start(&self) -> Result<(), String> {
        let mut state = lock(&self.state);
        state.touched_ns = monotonic_ns();
        if state.peer.is_none() {
            return Err(
                "no UDP packet of this session has arrived, so there is nowhere to send to"
                    .to_owned(),
            );
        }
        if state.sender.schedule.is_none() && !state.sender.stopped {
            let begin_ns = state.touched_ns + START_IN_NS.max(self.period_ns);
            state.sender.schedule = Some(Schedule::new(begin_ns, self.period_ns));
        }
        Ok(())
    }

    fn stop(&self) {
        lock(&self.state).sender.stop();
    }

    /// Stops sending and tells everything.
    pub(super) fn finish(&self, to_vm_sent: u64) -> Finished {
        let mut state = lock(&self.state);
        state.sender.stop();
        state.touched_ns = monotonic_ns();
        let now_ns = state.touched_ns;
        let received = state.received(now_ns);
        let longest = state.arrivals.longest();
        let lateness = state.sender.lateness.histogram();
        Finished {
            from_vm_sent: state.sender.sent,
            send_errors: state.sender.errors,
            shortages: state.sender.shortages,
            lateness: lateness
                .iter_recorded()
                .map(|value| {
                    (
                        value.value_iterated_to(),
                        value.count_since_last_iteration(),
                    )
                })
                .collect(),
            rescheduled: state.sender.rescheduled,
            longest_reschedule_ns: state.sender.longest_reschedule_ns,
            to_vm: state.ledger.summary(to_vm_sent),
            receiver_overflow: u64::from(state.overflow),
            now_ns,
            last_age_ns: state
                .arrivals
                .last_ns()
                .map_or(0, |last| now_ns.saturating_sub(last)),
            first_new_age_ns: state.first_new_ns.map(|first| now_ns.saturating_sub(first)),
            inner_gap_ns: u64::from(received.inner_gap_us) * MICROSECOND,
            gaps: longest.kept(),
            unlogged_gap_ns: longest.unkept_bound_ns(),
            stream_retransmits: state.stream_retransmits,
            connections: state.call.as_ref().and_then(|call| call.attempts.clone()),
        }
    }

    /// Every packet that is kept.
    pub(super) fn log(&self) -> RemoteLog {
        let mut state = lock(&self.state);
        state.touched_ns = monotonic_ns();
        let log = state.log.as_ref();
        log.map_or_else(RemoteLog::default, |log| RemoteLog {
            arrivals: log.arrivals.iter().copied().collect(),
            sent: log.sent.iter().copied().collect(),
            forgotten: log.arrivals.forgotten + log.sent.forgotten,
        })
    }

    /// Begins to call: greets `to`. True if the stream is still to be dialled, which is then taken for done.
    pub(super) fn call(
        &self,
        to: SocketAddr,
        stream: bool,
        connections: Option<Connections>,
    ) -> Result<bool, String> {
        if to.is_ipv4() != self.source.is_ipv4() {
            return Err(format!(
                "{to} cannot be called from {}: another address family",
                self.source
            ));
        }
        let mut state = lock(&self.state);
        state.touched_ns = monotonic_ns();
        state.peer.get_or_insert(to);
        let call = state.call.get_or_insert(Call {
            to,
            dialled: false,
            connections,
            attempts: None,
        });
        let dial = stream && !std::mem::replace(&mut call.dialled, true);
        drop(state);
        self.welcome(to);
        Ok(dial)
    }

    /// Whom to open connections to, and how often; none if there is nobody, or it was asked before.
    pub(super) fn take_connections(&self) -> Option<(SocketAddr, Connections)> {
        let mut state = lock(&self.state);
        let call = state.call.as_mut()?;
        let connections = call.connections.take()?;
        call.attempts = Some(Attempts::default());
        Some((call.to, connections))
    }

    /// Changes the account of the connections opened.
    pub(super) fn attempts(&self, change: impl FnOnce(&mut Attempts)) {
        let mut state = lock(&self.state);
        if let Some(attempts) = state.call.as_mut().and_then(|call| call.attempts.as_mut()) {
            change(attempts);
        }
    }

    /// Whether it will never send again.
    pub(super) fn is_stopped(&self) -> bool {
        lock(&self.state).sender.stopped
    }

    pub(super) fn id(&self) -> u64 {
        self.id
    }

    /// The address that the client knows this machine by.
    pub(super) fn source(&self) -> IpAddr {
        self.source
    }

    fn welcome(&self, to: SocketAddr) {
        let mut bytes = [0; MIN_PACKET];
        Packet {
            session: self.id,
            body: Body::Welcome,
        }
        .encode(&mut bytes);
        if let Err(error) = self.send(&bytes, &to.into()) {
            tracing::warn!(%to, %error, "cannot answer");
        }
    }

    pub(super) fn set_stream_retransmits(&self, count: u64) {
        lock(&self.state).stream_retransmits = Some(count);
    }

    /// When the next packet is due; none if there is none.
    pub(super) fn due_ns(&self) -> Option<u64> {
        lock(&self.state).sender.due_ns()
    }

    /// Sends what is due by `now_ns`.
    pub(super) fn send_due(&self, now_ns: u64, buffer: &mut [u8]) {
        while let Some((data, received, peer)) = lock(&self.state).next_due(now_ns) {
            let bytes = &mut buffer[..self.packet_bytes];
            Packet {
                session: self.id,
                body: Body::FromVm(data, received),
            }
            .encode(bytes);
            if let Err(error) = self.send(bytes, &peer.into()) {
                let sender = &mut lock(&self.state).sender;
                sender.errors += 1;
                sender.shortages += u64::from(!sys::is_outage(&error));
            }
        }
    }

    fn send(&self, bytes: &[u8], to: &SockAddr) -> io::Result<()> {
        sys::send_from(self.socket.as_raw_fd(), bytes, to, Some(self.source))
    }
}

impl Sender {
    fn stop(&mut self) {
        self.schedule = None;
        self.stopped = true;
    }

    fn due_ns(&self) -> Option<u64> {
        self.schedule.map(|schedule| schedule.due_ns(self.sent))
    }
}

impl State {
    /// The next packet, if it is due, taken for sent; its lateness as of `now_ns`.
    fn next_due(&mut self, now_ns: u64) -> Option<(Data, Received, SocketAddr)> {
        let due_ns = self.sender.due_ns().filter(|&due_ns| due_ns <= now_ns)?;
        let peer = self.peer?;
        if now_ns.saturating_sub(self.touched_ns) > SILENCE_NS {
            let behind_ns = now_ns - due_ns;
            self.sender
                .schedule
                .iter_mut()
                .for_each(|schedule| schedule.postpone(behind_ns + LOOK_AGAIN_NS));
            return None;
        }
        let behind_ns = now_ns - due_ns;
        let late_us = micros_u32(behind_ns);
        let sender = &mut self.sender;
        if behind_ns > nanos(RESCHEDULE) {
            sender.rescheduled += 1;
            sender.longest_reschedule_ns = sender.longest_reschedule_ns.max(behind_ns);
            sender
                .schedule
                .iter_mut()
                .for_each(|schedule| schedule.postpone(behind_ns));
        } else {
            sender.lateness.record_n(u64::from(late_us), 1);
        }
        let data = Data {
            sequence: sender.sent,
            intended_ns: due_ns,
            late_us,
        };
        sender.sent += 1;
        if let Some(log) = &mut self.log {
            // As the client will read it from the packet.
            let sent_ns = due_ns + u64::from(late_us) * MICROSECOND;
            log.sent.push((data.sequence, sent_ns));
        }
        Some((data, self.take_received(now_ns), peer))
    }

    fn new(period_ns: u64, log: bool) -> Self {
        let sender = Sender {
            schedule: None,
            stopped: false,
            sent: 0,
            errors: 0,
            shortages: 0,
            lateness: LatenessLog::new(u64::MAX),
            rescheduled: 0,
            longest_reschedule_ns: 0,
        };
        Self {
            peer: None,
            touched_ns: monotonic_ns(),
            ledger: Ledger::default(),
            arrivals: Arrivals::every(period_ns),
            first_new_ns: None,
            inner_gap_ns: 0,
            overflow_base: None,
            overflow: 0,
            sender,
            stream_retransmits: None,
            call: None,
            log: log.then(Log::default),
        }
    }

    fn arrived(&mut self, sequence: u64, at_ns: u64) {
        let arrival = self.ledger.record(sequence);
        if let Some(log) = self.log.as_mut().filter(|_| arrival != Arrival::Absurd) {
            log.arrivals.push((sequence, at_ns));
        }
        if !matches!(arrival, Arrival::InOrder | Arrival::Reordered) {
            return;
        }
        let since_last_ns = self.arrivals.arrived(at_ns, 0);
        if self.first_new_ns.is_none() {
            self.first_new_ns = Some(at_ns);
        } else if let Some(since_last_ns) = since_last_ns {
            self.inner_gap_ns = self.inner_gap_ns.max(since_last_ns);
        }
    }

    fn received(&self, now_ns: u64) -> Received {
        let age_us = |at_ns: u64| micros_u32(now_ns.saturating_sub(at_ns));
        Received {
            count: self.ledger.received(),
            highest: self.ledger.highest().unwrap_or(0),
            last_age_us: self.arrivals.last_ns().map(age_us),
            first_new_age_us: self.first_new_ns.map(age_us),
            inner_gap_us: micros_u32(self.inner_gap_ns),
        }
    }

    /// As of now, and begins the next interval.
    fn take_received(&mut self, now_ns: u64) -> Received {
        let received = self.received(now_ns);
        self.first_new_ns = None;
        self.inner_gap_ns = 0;
        received
    }

    /// The kernel counts from the socket's creation; a session from its first packet.
    fn see_overflow(&mut self, count: Option<u32>) {
        let count = count.unwrap_or(0);
        let base = *self.overflow_base.get_or_insert(count);
        self.overflow = count.wrapping_sub(base);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PERIOD_NS: u64 = MILLISECOND;

    /// A session that has sent nothing yet; its first packet is due at the time returned.
    fn sending() -> (State, u64) {
        let mut state = State::new(PERIOD_NS, true);
        let begin_ns = state.touched_ns;
        state.peer = Some(([127, 0, 0, 1], 7000).into());
        state.sender.schedule = Some(Schedule::new(begin_ns, PERIOD_NS));
        (state, begin_ns)
    }

    fn next(state: &mut State, now_ns: u64) -> Option<(u64, u64, u32)> {
        state
            .next_due(now_ns)
            .map(|(data, ..)| (data.sequence, data.intended_ns, data.late_us))
    }

    #[test]
    fn a_late_sender_catches_up_without_skipping() {
        let (mut state, begin_ns) = sending();
        let now_ns = begin_ns + 2 * PERIOD_NS;
        assert_eq!(next(&mut state, now_ns), Some((0, begin_ns, 2000)));
        assert_eq!(
            next(&mut state, now_ns),
            Some((1, begin_ns + PERIOD_NS, 1000))
        );
        assert_eq!(next(&mut state, now_ns), Some((2, now_ns, 0)));
        assert_eq!(next(&mut state, now_ns), None);
    }

    #[test]
    fn what_a_jump_of_the_clock_left_out_is_not_made_up_for() {
        let (mut state, begin_ns) = sending();
        let now_ns = begin_ns + 3_000 * MILLISECOND;
        // Intended and late still add up to when it was sent, from which the client tells how the clock went.
        assert_eq!(next(&mut state, now_ns), Some((0, begin_ns, 3_000_000)));
        assert_eq!(next(&mut state, now_ns), None);
        assert_eq!(
            next(&mut state, now_ns + PERIOD_NS),
            Some((1, now_ns + PERIOD_NS, 0))
        );
        assert_eq!(
            (state.sender.rescheduled, state.sender.longest_reschedule_ns),
            (1, 3_000 * MILLISECOND)
        );
    }

    #[test]
    fn every_copy_and_every_sending_is_logged_and_nothing_absurd() {
        let (mut state, begin_ns) = sending();
        for (sequence, after_ns) in [(0, 1), (0, 2), (2, 3), (u64::MAX, 4)] {
            state.arrived(sequence, begin_ns + after_ns);
        }
        next(&mut state, begin_ns + 1_999);
        let log = state.log.expect("it was asked for");
        let arrivals: Vec<_> = log.arrivals.iter().copied().collect();
        assert_eq!(
            arrivals,
            [(0, begin_ns + 1), (0, begin_ns + 2), (2, begin_ns + 3)]
        );
        let sent: Vec<_> = log.sent.iter().copied().collect();
        assert_eq!(sent, [(0, begin_ns + MICROSECOND)], "to the microsecond");
    }

    #[test]
    fn nothing_is_sent_to_a_silent_client_until_it_is_heard_of_again() {
        let (mut state, begin_ns) = sending();
        let now_ns = begin_ns + SILENCE_NS + 1;
        assert_eq!(next(&mut state, now_ns), None);
        assert_eq!(state.sender.due_ns(), Some(now_ns + LOOK_AGAIN_NS));
        state.touched_ns = now_ns;
        assert_eq!(
            next(&mut state, now_ns + LOOK_AGAIN_NS),
            Some((0, now_ns + LOOK_AGAIN_NS, 0))
        );
    }
}
