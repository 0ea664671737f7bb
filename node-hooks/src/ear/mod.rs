//! What is heard of a guest on the host's side of its port.
//!
//! # Guarantees
//! - Times are the kernel's, taken when the frame passed the interface.
//! - Only what comes out of the guest is heard, not what is sent to it.
//! - A guest that announces itself without end is heard [`RATE`] times a second, and costs no more than that.
//! - The data plane gives two filters, of some dozen instructions each, for a frame that nobody wants to hear; the kernel
//!   keeps copies of the headers of some four thousand frames a second at most.
//!
//! # Caveats
//! - An announcement in a VLAN is none: it is about another network than the port's.
//! - An IPv6 extension header hides a neighbour advertisement. No host sends them with one.
//! - Stamping costs some ten nanoseconds for every frame that the machine receives, as long as anything is listened to.

mod filter;
mod frame;
mod pace;
mod sampler;

use std::io;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use arp_proxy::answer::Frame;
use arp_proxy::socket::{Buffer, Options, PacketSocket, RawSocket, Received, index_of};
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};

use crate::time::Nanos;

/// An Ethernet address.
pub use arp_proxy::Mac as MacAddr;
use frame::Announcement;
pub(crate) use pace::Pace;
pub use pace::RATE;
use sampler::Sampler;

/// Announcements are few, and a process that is kept waiting has room for thousands.
const RECEIVE_BUFFER: i32 = 1 << 18;

/// What was heard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Heard {
    /// A RARP request, with which QEMU announces a guest (RFC 903).
    Rarp,
    /// A gratuitous ARP request or reply (RFC 5227, section 3).
    Garp,
    /// An unsolicited neighbour advertisement to all nodes (RFC 4861, section 7.2.6).
    NeighbourAdvertisement,
    /// Anything else.
    Frame,
}

/// A frame that came out of a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeardFrame {
    /// The interface that it came in through.
    pub interface: String,
    /// The guest's Ethernet address; where `own_mac` is false, the one that is announced instead.
    pub mac: MacAddr,
    /// What it is.
    pub heard: Heard,
    /// It comes from the guest's Ethernet address, and names no other one. False only of announcements.
    pub own_mac: bool,
    /// When it passed the interface, by the kernel's stamp.
    pub at: Nanos,
    /// When this process had read it.
    pub seen: Nanos,
}

/// The last frame that was heard of a guest so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LastFrame {
    /// When it passed the interface, by the kernel's stamp.
    pub at: Nanos,
    /// The guest may have sent more for this long after it, and has sent none later. Zero where it sends no more than
    /// four thousand frames a second.
    pub within: Duration,
}

/// Why an interface cannot be listened to.
#[derive(Debug, thiserror::Error)]
pub enum EarError {
    /// It is not there.
    #[error(
        "there is no interface {interface} in the agent's network namespace; it has to be the host's"
    )]
    NoInterface {
        /// Its name.
        interface: String,
        /// The system's answer.
        source: io::Error,
    },
    /// Not allowed, most likely.
    #[error("cannot listen to {interface}; it takes CAP_NET_RAW")]
    Open {
        /// Its name.
        interface: String,
        /// The system's answer.
        source: io::Error,
    },
}

/// Listens to an interface until it is dropped.
#[derive(Debug)]
pub struct Ear {
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

/// Knows the last frame that an [`Ear`] has heard.
#[derive(Clone, Debug)]
pub struct Last(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    interface: String,
    mac: MacAddr,
    socket: PacketSocket,
    /// Since when the next frame that is no announcement is waited for.
    expected: Mutex<Option<Nanos>>,
    sampler: Mutex<Sampler>,
    missed: Arc<AtomicU64>,
}

// === impl Ear ===

impl Ear {
    /// Listens from now on to what the guest with this Ethernet address sends into an interface: a tap, or the host's end
    /// of the pod's veth.
    ///
    /// Every announcement goes to `out`, by whomever it is and of whomever. One that comes faster than [`RATE`], or that
    /// finds no room there, is left out and counted in `missed`.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    ///
    /// # Errors
    /// When there is no such interface, or this process may not listen.
    pub fn listen(
        interface: &str,
        mac: MacAddr,
        out: mpsc::Sender<HeardFrame>,
        missed: Arc<AtomicU64>,
    ) -> Result<Self, EarError> {
        let index = index_of(interface).map_err(|source| EarError::NoInterface {
            interface: interface.to_owned(),
            source,
        })?;
        let open = || {
            let options = Options {
                filter: &filter::announcements(),
                receive_buffer: RECEIVE_BUFFER,
                groups: &[],
                stamps: true,
            };
            let socket = PacketSocket::new(RawSocket::open(index, &options)?)?;
            Ok((socket, Sampler::open(index, mac)?))
        };
        let (socket, sampler) = open().map_err(|source| EarError::Open {
            interface: interface.to_owned(),
            source,
        })?;
        let shared = Arc::new(Shared {
            interface: interface.to_owned(),
            mac,
            socket,
            expected: Mutex::default(),
            sampler: Mutex::new(sampler),
            missed,
        });
        let task = tokio::spawn(run(index, shared.clone(), out));
        Ok(Self { shared, task })
    }

    /// Has the next frame from the guest that is no announcement reported too: the first from now on, once.
    pub fn expect_first(&self) -> io::Result<()> {
        let mut expected = lock(&self.shared.expected);
        let filter = filter::announcements_and(self.shared.mac);
        self.shared.socket.set_filter(&filter)?;
        *expected = Some(Nanos::now());
        Ok(())
    }

    /// What knows the last frame from the guest, also on another thread, and when this is no more.
    pub fn last(&self) -> Last {
        Last(self.shared.clone())
    }

    /// The interface is gone, or nobody hears what is heard.
    pub fn has_ended(&self) -> bool {
        self.task.is_finished()
    }
}

impl Last {
    /// The last frame from the guest so far, announcements included; none if it has sent none since it was listened to. To
    /// be asked soon after the guest stands still: the sooner, the more certain the answer. Takes some microseconds, and
    /// for a guest that has just become fast some milliseconds.
    pub fn frame(&self) -> Option<LastFrame> {
        let mut sampler = lock(&self.0.sampler);
        sampler.empty();
        sampler.last()
    }
}

impl Drop for Ear {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn run(index: u32, shared: Arc<Shared>, out: mpsc::Sender<HeardFrame>) {
    let mut buffer = Buffer::new();
    let mut pace = Pace::new(Instant::now());
    let mut dropped = 0;
    let mut sample = interval(sampler::PERIOD);
    sample.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let pause = pace.pause();
        tokio::select! {
            received = async {
                // What comes meanwhile waits in the socket's buffer, or is dropped there.
                sleep_until(pause).await;
                shared.socket.receive(&mut buffer).await
            } => match received {
                Ok(received) => {
                    let lost = received.dropped.wrapping_sub(dropped);
                    shared.missed.fetch_add(lost.into(), Relaxed);
                    dropped = received.dropped;
                    pace.take(Instant::now());
                    if shared.take(&received, &out).is_err() {
                        return;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Passing, or the sampler will know better.
                Err(error) if error.kind() == io::ErrorKind::NetworkDown => {}
                Err(error) => {
                    tracing::debug!(interface = shared.interface, %error, "heard no more");
                    return;
                }
            },
            _ = sample.tick() => {
                let is_down = {
                    let mut sampler = lock(&shared.sampler);
                    sampler.empty();
                    sampler.is_down()
                };
                // It goes down before it goes away, of which nothing more is told.
                if is_down && index_of(&shared.interface).ok() != Some(index) {
                    return;
                }
            }
        }
    }
}

/// Nobody hears.
struct Deaf;

impl Shared {
    fn take(&self, received: &Received<'_>, out: &mpsc::Sender<HeardFrame>) -> Result<(), Deaf> {
        let seen = Nanos::now();
        let at = received.stamp.map_or(seen, Nanos).min(seen);
        let Some((mac, heard, own_mac)) = self.tell(received, at) else {
            return Ok(());
        };
        let frame = HeardFrame {
            interface: self.interface.clone(),
            mac,
            heard,
            own_mac,
            at,
            seen,
        };
        match out.try_send(frame) {
            Ok(()) => Ok(()),
            // Waiting would make the next ones late too.
            Err(TrySendError::Full(_)) => {
                self.missed.fetch_add(1, Relaxed);
                Ok(())
            }
            Err(TrySendError::Closed(_)) => Err(Deaf),
        }
    }

    /// Whose, what, and whether it is the guest's own, of what is to be told.
    fn tell(&self, received: &Received<'_>, at: Nanos) -> Option<(MacAddr, Heard, bool)> {
        let frame = Frame::parse(received.bytes, received.tag)?;
        if let Some(announcement) = Announcement::of(&frame) {
            let other = announcement.other_than(self.mac);
            return Some((
                other.unwrap_or(self.mac),
                announcement.heard,
                other.is_none(),
            ));
        }
        let first = frame.source == self.mac && self.is_first(at);
        first.then_some((self.mac, Heard::Frame, true))
    }

    /// Whether a frame is the first that was waited for; then none is any more.
    fn is_first(&self, at: Nanos) -> bool {
        let mut expected = lock(&self.expected);
        // The kernel may have let it through for an earlier wait.
        if expected.is_none_or(|since| at < since) {
            return false;
        }
        *expected = None;
        // Should it fail, every frame costs a look, until this is dropped.
        if let Err(error) = self.socket.set_filter(&filter::announcements()) {
            tracing::debug!(interface = self.interface, %error, "the filter stays wide");
        }
        true
    }
}

/// What a panic elsewhere leaves is still what it says.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
