//! Gaps in what the *other* side received, placed on this side's clock.
//!
//! The reflector's clock cannot be trusted: that of a virtual machine stands still while the machine is paused, so a
//! pause is invisible on it. But every packet that comes from the reflector says how long ago, on the reflector's
//! clock, the newest arrival was. The host's receive time less that age is when it arrived, on the host's clock, plus
//! the (nearly constant) time from the reflector to here.
//!
//! # Resolution
//! While no packet from the reflector is lost, a gap is exact to the jitter of that path, plus one period of it where
//! the reflector's clock stood still: an arrival in the period before the pause may be taken for one after it.
//!
//! Where the reflector itself was silent around a pause, the pause is added to the longest gap of that time, since it
//! may have fallen there; there was one as long as the pause in any case.
//!
//! # Caveats
//! An age does not count the time that the reflector's clock stood still, so after a pause the newest arrival may seem
//! to be later than it was: no later than the pause was long, though, and no earlier than the packet had been sent.
//! Where the two leave room, [`Interval::error_ns`] says how much.
//!
//! Where packets from the reflector were lost, it is not known when the arrivals of that time took place. Then the
//! reflector's own log of gaps bounds the gap, to which the time its clock stood still is added, as it might have
//! fallen into it: such a gap is an upper bound, and [`Interval::error_ns`] says by how much.

use crate::gaps::{Interval, Longest};

/// What a packet from the reflector tells about the reflector's arrivals.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Snapshot {
    /// When it was received here, `CLOCK_REALTIME`.
    pub host_ns: u64,
    /// The packet's own sequence number.
    pub sequence: u64,
    /// When it was sent, on the reflector's clock.
    pub remote_ns: u64,
    /// How many different packets the reflector had received.
    pub count: u64,
    /// The highest sequence number among them.
    pub highest: u64,
    /// How long before `remote_ns` the newest arrived.
    pub last_age_ns: u64,
    /// How long before `remote_ns` the first since the previous snapshot arrived.
    pub first_new_age_ns: Option<u64>,
    /// The longest interval between two arrivals since the previous snapshot.
    pub inner_gap_ns: u64,
}

/// Two snapshots between which others were lost, and arrivals happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Blind {
    before: Snapshot,
    after: Snapshot,
    /// When the last arrival known from `before` took place.
    last: Placed,
}

/// A time on the host's clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Placed {
    /// The latest that it can have been.
    at_ns: u64,
    /// The earliest.
    floor_ns: u64,
}

/// Collects snapshots; see the [module](self).
#[derive(Debug, Clone)]
pub struct RemoteArrivals {
    previous: Option<Snapshot>,
    /// When the newest arrival took place.
    last: Option<Placed>,
    /// When the client began to send.
    start_ns: u64,
    period_ns: u64,
    longest: Longest,
    blind: Vec<Blind>,
}

/// Blind stretches beyond this many are left out, shortest first: it takes as many separate losses to get there.
const KEPT_BLIND: usize = 4096;

impl RemoteArrivals {
    /// For a stream sent every `period_ns` from `start_ns` on.
    pub fn every(period_ns: u64, start_ns: u64) -> Self {
        Self {
            previous: None,
            last: None,
            start_ns,
            period_ns,
            longest: Longest::above(period_ns * 2),
            blind: Vec::new(),
        }
    }

    /// The newest arrival known, on the host's clock.
    pub fn last_ns(&self) -> Option<u64> {
        self.last.map(|last| last.at_ns)
    }

    /// The newest snapshot.
    pub fn newest(&self) -> Option<&Snapshot> {
        self.previous.as_ref()
    }

    /// Enters a snapshot. One that was overtaken by a newer one tells nothing new and is left out.
    pub fn observe(&mut self, snapshot: Snapshot) {
        let Some(previous) = self.previous else {
            self.begin(snapshot);
            return;
        };
        if snapshot.sequence <= previous.sequence {
            return;
        }
        self.previous = Some(snapshot);
        if snapshot.count <= previous.count {
            return;
        }
        let Some(last) = self.last else {
            self.begin(snapshot);
            return;
        };
        let newest = self.place_newest(&previous, &snapshot, last);
        self.last = Some(newest);
        if snapshot.sequence == previous.sequence + 1 {
            self.enter_seen(&previous, &snapshot, last, newest);
        } else {
            self.enter_blind(Blind {
                before: previous,
                after: snapshot,
                last,
            });
        }
    }

    /// The gaps, given the reflector's own log of gaps (its clock), and up to which length gaps are missing from it.
    pub fn resolve(&self, remote_gaps: &[Interval], unlogged_ns: u64) -> Longest {
        let mut longest = self.longest.clone();
        for blind in &self.blind {
            longest.push(blind.resolve(remote_gaps, unlogged_ns));
        }
        longest.drop_doubtful();
        longest
    }

    fn begin(&mut self, snapshot: Snapshot) {
        self.previous = Some(snapshot);
        if snapshot.count == 0 {
            return;
        }
        let newest_ns = snapshot.host_ns.saturating_sub(snapshot.last_age_ns);
        self.last = Some(Placed {
            at_ns: newest_ns,
            floor_ns: newest_ns,
        });
        // Fewer arrived than were sent up to the highest: the first ones may be missing, so the gap is from the start.
        if snapshot.count <= snapshot.highest {
            self.longest.push(interval(
                Placed {
                    at_ns: self.start_ns,
                    floor_ns: self.start_ns,
                },
                newest_ns,
            ));
        }
    }

    /// Enters the gaps between two snapshots of which the second accounts for all arrivals since the first.
    fn enter_seen(
        &mut self,
        previous: &Snapshot,
        snapshot: &Snapshot,
        last: Placed,
        newest: Placed,
    ) {
        let first_age = snapshot.first_new_age_ns.unwrap_or(snapshot.last_age_ns);
        let first_ns = snapshot
            .host_ns
            .saturating_sub(first_age)
            .clamp(last.at_ns, newest.at_ns);
        let inner_ns = snapshot.inner_gap_ns;
        let stood_still = stood_still_ns(previous, snapshot);
        if stood_still <= self.period_ns {
            self.longest.push(interval(last, first_ns));
            let first = Placed {
                at_ns: first_ns,
                floor_ns: first_ns,
            };
            self.longest
                .push(interval(first, newest.at_ns.min(first_ns + inner_ns)));
            return;
        }
        // The pause took place in one of the gaps, on the reflector's clock unseen: at most in the longest of them. A
        // gap as long as the pause there was in any case.
        let until_first_ns = (first_ns - last.floor_ns).saturating_sub(stood_still);
        let longest_ns = until_first_ns.max(inner_ns);
        let most = longest_ns + stood_still;
        let start_ns = if until_first_ns >= inner_ns {
            last.floor_ns
        } else {
            // Anywhere between the two snapshots; its length is what counts.
            first_ns.saturating_sub(stood_still).max(last.floor_ns)
        };
        let error_ns = most - longest_ns.max(stood_still);
        self.longest.push(Interval {
            start_ns,
            end_ns: start_ns + most,
            // Below a period it is the resolution.
            error_ns: if error_ns <= self.period_ns {
                0
            } else {
                error_ns
            } + (last.at_ns - last.floor_ns),
            ..Interval::default()
        });
    }

    fn place_newest(&self, previous: &Snapshot, snapshot: &Snapshot, last: Placed) -> Placed {
        let at_ns = snapshot
            .host_ns
            .saturating_sub(snapshot.last_age_ns)
            .max(last.at_ns);
        let stood_still = stood_still_ns(previous, snapshot);
        // Less than a period is the jitter of the path, not a pause.
        if stood_still <= self.period_ns {
            return Placed {
                at_ns,
                floor_ns: at_ns,
            };
        }
        let sent_ns = self.start_ns + snapshot.highest.saturating_mul(self.period_ns);
        let floor_ns = at_ns
            .saturating_sub(stood_still)
            .max(sent_ns)
            .max(last.floor_ns)
            .min(at_ns);
        Placed { at_ns, floor_ns }
    }

    fn enter_blind(&mut self, blind: Blind) {
        if self.blind.len() < KEPT_BLIND {
            self.blind.push(blind);
        } else if let Some(shortest) = self.blind.iter_mut().min_by_key(|kept| kept.span_ns())
            && shortest.span_ns() < blind.span_ns()
        {
            *shortest = blind;
        }
    }
}

impl Blind {
    fn span_ns(&self) -> u64 {
        self.after.host_ns.saturating_sub(self.before.host_ns)
    }

    fn resolve(&self, remote_gaps: &[Interval], unlogged_ns: u64) -> Interval {
        let (from_ns, to_ns) = (self.before.remote_ns, self.after.remote_ns);
        let logged = remote_gaps
            .iter()
            .filter(|gap| gap.end_ns > from_ns && gap.start_ns < to_ns)
            .map(|gap| self.on_host(gap))
            .max_by_key(Interval::length_ns);
        let found = logged.unwrap_or(Interval {
            start_ns: self.last.floor_ns,
            end_ns: self.last.floor_ns + unlogged_ns,
            error_ns: unlogged_ns,
            ..Interval::default()
        });
        // The arrivals known on the host's clock bound it, whatever the reflector says.
        let newest_ns = self.after.host_ns.saturating_sub(self.after.last_age_ns);
        let bound = newest_ns.saturating_sub(self.last.floor_ns);
        let least = (found.length_ns() - found.error_ns).min(bound);
        let most = (found.length_ns() + stood_still_ns(&self.before, &self.after)).min(bound);
        let latest_ns = newest_ns.saturating_sub(most).max(self.last.floor_ns);
        let start_ns = found.start_ns.clamp(self.last.floor_ns, latest_ns);
        Interval {
            start_ns,
            end_ns: start_ns + most,
            error_ns: most - least,
            ..found
        }
    }

    /// Places a gap of the reflector's log, as if its clock had not stood still in between.
    fn on_host(&self, gap: &Interval) -> Interval {
        let place =
            |remote_ns: u64| self.before.host_ns + remote_ns.saturating_sub(self.before.remote_ns);
        if gap.start_ns >= self.before.remote_ns {
            return Interval {
                start_ns: place(gap.start_ns),
                end_ns: place(gap.end_ns),
                ..*gap
            };
        }
        // It was under way already: its begin is known on the host's clock, pauses since then included.
        interval(self.last, place(gap.end_ns).max(self.last.at_ns))
    }
}

/// How much less time passed on the reflector's clock than on the host's.
fn stood_still_ns(before: &Snapshot, after: &Snapshot) -> u64 {
    let on_host = after.host_ns.saturating_sub(before.host_ns);
    on_host.saturating_sub(after.remote_ns.saturating_sub(before.remote_ns))
}

fn interval(from: Placed, end_ns: u64) -> Interval {
    let error_ns = from.at_ns - from.floor_ns;
    Interval {
        start_ns: from.floor_ns,
        end_ns,
        error_ns,
        ..Interval::default()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::clock::MILLISECOND as MS;

    const PERIOD: u64 = MS;
    /// From the host to the reflector.
    const TRIP: u64 = MS / 4;
    /// The reflector's clock began elsewhere.
    const SKEW: u64 = 77_000 * MS;

    /// A reflector whose clock stands still from `pause.0` for `pause.1`, as the host would see it.
    ///
    /// The host sends one packet a millisecond, without those in `lost`; what arrives during the pause is received at
    /// its end, as a tap's queue would have it.
    #[derive(Debug)]
    struct World {
        pause: (u64, u64),
        lost: std::ops::Range<u64>,
        /// From which packet on the reflector's packets are late, and by how many periods: it had no processor.
        silent: (u64, u64),
    }

    impl World {
        fn quiet() -> Self {
            Self {
                pause: (u64::MAX / 2, 0),
                lost: 0..0,
                silent: (0, 0),
            }
        }

        fn remote(&self, host: u64) -> u64 {
            let (at, length) = self.pause;
            SKEW + if host < at {
                host
            } else {
                at + host.saturating_sub(at + length)
            }
        }

        /// Sequence number and time of arrival on the host's clock.
        fn arrived(&self) -> Vec<(u64, u64)> {
            let (at, length) = self.pause;
            let arrival = |sequence: u64| {
                let time = sequence * PERIOD + TRIP;
                (
                    sequence,
                    if (at..at + length).contains(&time) {
                        at + length
                    } else {
                        time
                    },
                )
            };
            (0..400)
                .filter(|sequence| !self.lost.contains(sequence))
                .map(arrival)
                .collect()
        }

        fn true_longest(&self) -> u64 {
            self.arrived()
                .windows(2)
                .map(|pair| pair[1].1 - pair[0].1)
                .max()
                .unwrap_or(0)
        }

        /// The longest gap as the host makes it out. The reflector sends at half past each millisecond of its clock,
        /// and `delivered` tells which of these packets get through.
        fn longest(&self, delivered: impl Fn(u64) -> bool) -> Interval {
            let arrived = self.arrived();
            let mut collected = RemoteArrivals::every(PERIOD, 0);
            let mut before = 0;
            let (at, length) = self.pause;
            for sequence in 0..300 {
                let late = if sequence >= self.silent.0 {
                    self.silent.1
                } else {
                    0
                };
                let ran = (sequence + late) * PERIOD + PERIOD / 2;
                let host = if ran < at { ran } else { ran + length };
                let known = arrived.partition_point(|&(_, time)| time <= host);
                let newest = known.checked_sub(1).map(|newest| arrived[newest]);
                let now = self.remote(host);
                let new: Vec<u64> = arrived[before..known]
                    .iter()
                    .map(|&(_, time)| self.remote(time))
                    .collect();
                before = known;
                if delivered(sequence) {
                    collected.observe(Snapshot {
                        host_ns: host,
                        sequence,
                        remote_ns: now,
                        count: known as u64,
                        highest: newest.map_or(0, |(sequence, _)| sequence),
                        last_age_ns: newest.map_or(0, |(_, time)| now - self.remote(time)),
                        first_new_age_ns: new.first().map(|first| now - first),
                        inner_gap_ns: new
                            .windows(2)
                            .map(|pair| pair[1] - pair[0])
                            .max()
                            .unwrap_or(0),
                    });
                }
            }
            let remote: Vec<u64> = arrived.iter().map(|&(_, time)| self.remote(time)).collect();
            let logged: Vec<Interval> = remote
                .windows(2)
                .map(|pair| Interval {
                    start_ns: pair[0],
                    end_ns: pair[1],
                    ..Interval::default()
                })
                .filter(|gap| gap.length_ns() > 2 * PERIOD)
                .collect();
            collected
                .resolve(&logged, 2 * PERIOD)
                .longest()
                .expect("there were arrivals")
        }
    }

    #[test]
    fn a_quiet_stream_has_no_gap() {
        assert_eq!(World::quiet().longest(|_| true).length_ns(), PERIOD);
    }

    #[test]
    fn losses_towards_the_reflector_are_a_gap_of_their_length() {
        let gap = World {
            lost: 100..237,
            ..World::quiet()
        }
        .longest(|_| true);
        assert_eq!(
            (gap.start_ns, gap.end_ns, gap.error_ns),
            (99 * MS + TRIP, 237 * MS + TRIP, 0)
        );
    }

    #[test]
    fn losses_the_other_way_are_none() {
        let gap = World::quiet().longest(|sequence| !(100..237).contains(&sequence));
        assert!(gap.length_ns() <= 2 * PERIOD, "{gap:?}");
    }

    #[test]
    fn losses_of_both_at_once_are_placed_by_the_reflectors_log() {
        let world = World {
            lost: 120..170,
            ..World::quiet()
        };
        let gap = world.longest(|sequence| !(100..237).contains(&sequence));
        assert_eq!((gap.length_ns(), gap.error_ns), (51 * MS, 0));
        assert!(gap.start_ns.abs_diff(119 * MS) <= PERIOD, "{gap:?}");
    }

    #[test]
    fn a_pause_is_seen_although_the_reflectors_clock_stood_still() {
        let world = World {
            pause: (100 * MS, 60 * MS),
            ..World::quiet()
        };
        let gap = world.longest(|_| true);
        assert!(
            gap.length_ns().abs_diff(world.true_longest()) <= PERIOD,
            "{gap:?}"
        );
        assert_eq!(gap.error_ns, 0);
    }

    #[test]
    fn a_pause_is_seen_although_the_reflector_had_no_time_to_tell() {
        let world = World {
            pause: (150 * MS, 60 * MS),
            silent: (100, 90),
            ..World::quiet()
        };
        let gap = world.longest(|_| true);
        assert!(
            gap.length_ns().abs_diff(world.true_longest()) <= PERIOD,
            "{gap:?}"
        );
    }

    #[test]
    fn an_outage_that_outlasts_the_pause_is_one_gap() {
        // The last packet before the pause arrives after the last word from the reflector before it.
        let world = World {
            pause: (100 * MS + TRIP + 1, 60 * MS),
            lost: 101..260,
            ..World::quiet()
        };
        let gap = world.longest(|_| true);
        assert!(
            gap.length_ns().abs_diff(world.true_longest()) <= PERIOD,
            "{gap:?} for {}",
            world.true_longest()
        );
    }

    #[test]
    fn nothing_at_first_counts_from_the_start() {
        let gap = World {
            lost: 0..51,
            ..World::quiet()
        }
        .longest(|_| true);
        assert_eq!((gap.start_ns, gap.end_ns), (0, 51 * MS + TRIP));
    }

    proptest! {
        /// Whatever is lost in whichever direction, and wherever the clock stands still: never less than the truth by
        /// more than the stated resolution, and never more than it by more than the stated error.
        #[test]
        fn the_gap_is_within_its_stated_error(
            pause in (20 * MS..150 * MS, 0..80 * MS),
            lost_to in (20_u64..150, 0_u64..80),
            lost_from in (20_u64..150, 0_u64..80),
            silent in (20_u64..150, 0_u64..80),
        ) {
            let world = World { pause, lost: lost_to.0..lost_to.0 + lost_to.1, silent };
            let gap = world.longest(|sequence| !(lost_from.0..lost_from.0 + lost_from.1).contains(&sequence));
            let truth = world.true_longest();
            prop_assert!(gap.length_ns() + 2 * PERIOD >= truth, "{} for {truth}", gap.length_ns());
            prop_assert!(gap.length_ns() <= truth + gap.error_ns + 2 * PERIOD, "{gap:?} for {truth}");
        }
    }
}
