//! When the guest was heard last, at next to no cost.
//!
//! A socket's buffer keeps what came first and drops what comes when it is full, so the last frame of many is not to be
//! had from it by waiting. The socket here takes a random share of the guest's frames, headers only, and is emptied
//! twenty times a second by a clock: nobody wakes up for a frame. The share follows the guest's rate, so that there are
//! at most some four thousand frames a second, however many it sends. Of the others the kernel copies nothing.
//!
//! A guest that sends up to that many frames is heard whole, and its last frame known to the kernel's stamp. Of a faster
//! one the last that was taken is followed by some that were not: by a quarter of a millisecond's on average, while its
//! rate stays. Rates do not stay, so [`LastFrame::within`] says what is certain: from when on everything was heard again,
//! which is when it was asked for at the latest. An interface's counters would be exact, but tell no time.

use std::io;
use std::time::Duration;

use arp_proxy::Mac;
use arp_proxy::socket::{Buffer, Options, RawSocket};
use tokio::time::Instant;

use crate::time::Nanos;

use super::LastFrame;
use super::filter::{Share, sample};

/// How often the socket is emptied.
pub(super) const PERIOD: Duration = Duration::from_millis(50);
/// Frames that are to be taken in a period: four thousand a second.
const WANTED: u32 = 200;
/// Room for several times as many, a kilobyte or two of the kernel's memory each; a burst that the share does not fit yet
/// fills it.
const RECEIVE_BUFFER: i32 = 1 << 20;
/// Frames that are read at once: more than the buffer holds.
const MOST: u32 = 16_384;

/// Samples an interface's frames from one station.
#[derive(Debug)]
pub(super) struct Sampler {
    socket: RawSocket,
    mac: Mac,
    share: Share,
    /// When the period began.
    began: Instant,
    /// Frames that passed the filter since then.
    passed: u32,
    last: Option<Nanos>,
    /// Since when nothing was left out.
    whole_since: Nanos,
    /// The interface was down, and no frame has come since.
    down: bool,
    buffer: Buffer,
}

impl Sampler {
    pub(super) fn open(index: u32, mac: Mac) -> io::Result<Self> {
        let options = Options {
            filter: &sample(mac, Share::ALL),
            receive_buffer: RECEIVE_BUFFER,
            groups: &[],
            stamps: true,
        };
        Ok(Self {
            socket: RawSocket::open(index, &options)?,
            mac,
            share: Share::ALL,
            began: Instant::now(),
            passed: 0,
            last: None,
            whole_since: Nanos::now(),
            down: false,
            buffer: Buffer::new(),
        })
    }

    /// Takes in what has come. To be called every [`PERIOD`], and before the last frame is asked for.
    pub(super) fn empty(&mut self) {
        let emptied = self.read();
        let now = Instant::now();
        let since = self.socket.statistics().unwrap_or_default();
        if !emptied || since.dropped > 0 || self.share != Share::ALL {
            self.whole_since = Nanos::now();
        }
        self.passed = self.passed.saturating_add(since.passed);
        let elapsed = now.saturating_duration_since(self.began);
        // Of a moment there is little to learn.
        if elapsed >= PERIOD {
            self.adapt(share_for(self.share, self.passed, elapsed));
            self.began = now;
            self.passed = 0;
        }
    }

    pub(super) fn last(&self) -> Option<LastFrame> {
        self.last.map(|at| LastFrame {
            at,
            within: self.whole_since.since(at),
        })
    }

    /// The interface was down when this was told of it last: it may be gone.
    pub(super) fn is_down(&self) -> bool {
        self.down
    }

    /// Reads what there is; false if there may be more.
    fn read(&mut self) -> bool {
        for _ in 0..MOST {
            match self.socket.receive(&mut self.buffer) {
                Ok(received) => {
                    self.last = Some(received.stamp.map_or_else(Nanos::now, Nanos));
                    self.down = false;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Told once. What had come before may still be there.
                Err(error) if error.kind() == io::ErrorKind::NetworkDown => self.down = true,
                Err(_none_is_there) => return true,
            }
        }
        false
    }

    fn adapt(&mut self, share: Share) {
        if share != self.share && self.socket.set_filter(&sample(self.mac, share)).is_ok() {
            self.share = share;
        }
    }
}

/// The share that gives what is wanted, if the rate stays. Powers of two, and one smaller or larger only where that is
/// clear, as each change is a call to the kernel.
fn share_for(share: Share, passed: u32, elapsed: Duration) -> Share {
    let periods = (elapsed.as_secs_f64() / PERIOD.as_secs_f64()).max(1.0);
    let passed = f64::from(passed) / periods;
    let wanted = f64::from(WANTED);
    if passed <= wanted && (share == Share::ALL || passed >= wanted / 4.0) {
        return share;
    }
    let every = (f64::from(share.frames()) * passed / wanted).clamp(1.0, f64::from(1_u32 << 24));
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "clamped to what fits"
    )]
    let every = every.ceil() as u32;
    Share::one_in(every.next_power_of_two())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What passes of so many frames in a period, at each share that follows.
    fn settle(frames: u32) -> (Share, u32) {
        let mut share = Share::ALL;
        let mut passed = frames;
        for _ in 0..4 {
            share = share_for(share, passed, PERIOD);
            passed = frames / share.frames();
        }
        (share, passed)
    }

    #[test]
    fn a_quiet_guest_is_heard_whole() {
        assert_eq!(settle(0).0, Share::ALL);
        assert_eq!(settle(WANTED).0, Share::ALL);
    }

    #[test]
    fn a_guest_that_falls_silent_is_heard_whole_again() {
        let (share, _) = settle(50_000);
        assert_ne!(share, Share::ALL);
        assert_eq!(share_for(share, 0, PERIOD), Share::ALL);
    }

    proptest! {
        #[test]
        fn whatever_the_rate_what_is_taken_stays_within_bounds(frames in 0_u32..100_000_000) {
            let (share, passed) = settle(frames);
            prop_assert!(passed <= WANTED, "{passed} at {share:?}");
            prop_assert!(share == Share::ALL || passed >= WANTED / 4 - 1, "{passed} at {share:?}");
            // And it stays there.
            prop_assert_eq!(share_for(share, passed, PERIOD), share);
        }
    }
}
