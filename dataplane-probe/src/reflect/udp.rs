//! Receiving and sending for all sessions of one socket, in one thread.
//!
//! While a session sends, the thread wakes up only when a packet is due, and takes in what has arrived since: one
//! wake-up serves both directions, which is what costs most where the processor is slow. Nothing is lost by it, since
//! the time of an arrival is the kernel's.

use std::io;
use std::net::UdpSocket;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::session::{Session, Sessions};
use crate::clock::{MILLISECOND, monotonic_ns, realtime_offset_ns, sleep_until};
use crate::sys::{Batch, PACKETS, Wait, prompt_timers};
use crate::wire::{MAX_PACKET, Packet};

/// The longest sleep while arrivals wait: those of other sessions may be greetings.
const LONGEST_SLEEP_NS: u64 = 5 * MILLISECOND;
/// Packets taken in between two looks at what is due.
const MAX_BATCHES: usize = 8;

pub(super) fn serve(
    socket: &Arc<UdpSocket>,
    sessions: &Sessions,
    realtime: bool,
    stop: &AtomicBool,
) {
    prompt_timers();
    super::prefer(realtime, PACKETS);
    let mut inbox = Inbox {
        batch: Batch::new(MAX_PACKET),
        current: None,
    };
    let mut buffer = vec![0; MAX_PACKET];
    let mut generation = None;
    let mut sending = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let newest = sessions.generation();
        if generation.replace(newest) != Some(newest) {
            sending = sessions.sending_from(socket);
            // Lets go of one that may have been closed.
            inbox.current = None;
        }
        match sending
            .iter()
            .filter_map(|session: &Arc<Session>| session.due_ns())
            .min()
        {
            None => {
                inbox.take(socket, sessions, Wait::UntilTimeout);
            }
            Some(due_ns) => {
                sleep_until(due_ns.min(monotonic_ns() + LONGEST_SLEEP_NS));
                let mut more = true;
                for _ in 0..MAX_BATCHES {
                    more = more && inbox.take(socket, sessions, Wait::No);
                }
                let now_ns = monotonic_ns();
                for session in &sending {
                    session.send_due(now_ns, &mut buffer);
                }
            }
        }
    }
}

struct Inbox {
    batch: Batch,
    /// The session of the packet before, which is mostly that of the next.
    current: Option<(u64, Arc<Session>)>,
}

impl Inbox {
    /// Takes in a batch; true if there may be more.
    fn take(&mut self, socket: &UdpSocket, sessions: &Sessions, wait: Wait) -> bool {
        let count = match self.batch.receive(socket.as_fd(), wait) {
            Ok(count) => count,
            Err(error) => {
                pause_unless_expected(&error);
                return false;
            }
        };
        // Kernel timestamps are on the wall clock, ages must not jump with it: one comparison serves the batch.
        let offset_ns = realtime_offset_ns();
        let now_ns = monotonic_ns();
        for datagram in self.batch.datagrams(count) {
            let (Ok(packet), Some(from)) = (Packet::decode(datagram.bytes), datagram.from) else {
                continue;
            };
            if self
                .current
                .as_ref()
                .is_none_or(|(id, _)| *id != packet.session)
            {
                self.current = sessions
                    .get(packet.session)
                    .map(|session| (packet.session, session));
            }
            let Some((_, session)) = &self.current else {
                continue;
            };
            let at_ns = datagram
                .stamp_ns
                .map_or(now_ns, |stamp| {
                    stamp.cast_signed().wrapping_sub(offset_ns).cast_unsigned()
                })
                .min(now_ns);
            session.received(packet.body, from, at_ns, datagram.overflow);
        }
        count == Batch::CAPACITY
    }
}

/// Timeouts are how the loop looks at its stop flag, and the errors that ICMP messages leave concern other packets.
fn pause_unless_expected(error: &io::Error) {
    let expected = matches!(
        error.kind(),
        io::ErrorKind::WouldBlock
            | io::ErrorKind::TimedOut
            | io::ErrorKind::Interrupted
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::HostUnreachable
            | io::ErrorKind::NetworkUnreachable
            | io::ErrorKind::NetworkDown
    );
    if !expected {
        tracing::warn!(%error, "cannot receive UDP");
        std::thread::sleep(Duration::from_millis(100));
    }
}
