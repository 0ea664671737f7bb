//! Per-sequence accounting: which sequence numbers arrived, how often and in which order.
//!
//! # Guarantees
//! - A duplicate is counted as a duplicate and never makes up for a loss elsewhere: every sequence number has its own
//!   bit.
//! - Memory is constant: a window of [`Ledger::WINDOW`] sequence numbers; what falls out of it is settled.
//!
//! # Caveats
//! A packet that comes more than a window after the newest one was settled as lost (or received) already and is only
//! counted as [`Summary::stale`]. The window is 1,048,576 packets: 17 minutes at 1 kHz, 105 s at 10 kHz.

use serde::{Deserialize, Serialize};

/// Sequence numbers further ahead of the newest one than this are not believed.
///
/// It is 119 hours at 10 kHz; accepting anything would let one corrupted packet end the accounting.
const MAX_JUMP: u64 = 1 << 32;

/// How many of the longest loss runs are kept one by one.
pub const KEPT_RUNS: usize = 256;

/// What became of one arrival.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrival {
    /// The first copy, newer than everything before it.
    InOrder,
    /// The first copy, after a newer one had been seen (RFC 4737, section 3.3).
    Reordered,
    /// Another copy of one that was received.
    Duplicate,
    /// Older than the window: it can no longer be told whether it is a first copy.
    Stale,
    /// A sequence number that the sender cannot have reached; not counted anywhere.
    Absurd,
}

/// Consecutive sequence numbers of which none arrived.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// The first missing sequence number.
    pub first: u64,
    /// How many are missing in a row.
    pub count: u64,
}

/// The account of one direction.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Summary {
    /// Different sequence numbers received.
    pub received: u64,
    /// Sequence numbers below the number sent that were never received.
    pub lost: u64,
    /// Copies beyond the first.
    pub duplicated: u64,
    /// First copies that came after a newer one.
    pub reordered: u64,
    /// Arrivals older than the window.
    pub stale: u64,
    /// The highest sequence number received.
    pub highest: Option<u64>,
    /// The longest run of consecutive losses.
    pub longest_run: Option<Run>,
    /// How many runs of losses there were.
    pub run_count: u64,
    /// The [`KEPT_RUNS`] longest runs, in order of sequence.
    pub runs: Vec<Run>,
}

/// Accounts for the arrivals of one direction. See the [module](self) for what it promises.
#[derive(Debug, Clone)]
pub struct Ledger {
    /// Bit `s % window` tells whether sequence `s` arrived, for `base <= s < base + window`.
    bits: Vec<u64>,
    /// Everything below is settled. A multiple of 64.
    base: u64,
    /// One more than the highest sequence number received.
    next: u64,
    received: u64,
    duplicated: u64,
    reordered: u64,
    stale: u64,
    settled: Runs,
}

/// Finds runs in an ascending series of lost sequence numbers.
#[derive(Debug, Clone, Default)]
struct Runs {
    lost: u64,
    count: u64,
    open: Option<Run>,
    longest: Option<Run>,
    kept: Vec<Run>,
}

impl Default for Ledger {
    fn default() -> Self {
        Self::with_window(Self::WINDOW)
    }
}

impl Ledger {
    /// How many sequence numbers back an arrival is told apart from a duplicate.
    pub const WINDOW: usize = 1 << 20;

    /// A ledger with a window of its own, rounded up to a multiple of 64.
    pub fn with_window(window: usize) -> Self {
        Self {
            bits: vec![0; window.div_ceil(64).max(1)],
            base: 0,
            next: 0,
            received: 0,
            duplicated: 0,
            reordered: 0,
            stale: 0,
            settled: Runs::default(),
        }
    }

    /// Enters one arrival.
    pub fn record(&mut self, sequence: u64) -> Arrival {
        if sequence >= self.next.saturating_add(MAX_JUMP) {
            return Arrival::Absurd;
        }
        if sequence < self.base {
            self.stale += 1;
            return Arrival::Stale;
        }
        if sequence - self.base >= self.window() {
            self.settle_up_to(sequence);
        }
        let (word, mask) = self.position(sequence);
        if self.bits[word] & mask != 0 {
            self.duplicated += 1;
            return Arrival::Duplicate;
        }
        self.bits[word] |= mask;
        self.received += 1;
        if sequence < self.next {
            self.reordered += 1;
            return Arrival::Reordered;
        }
        self.next = sequence + 1;
        Arrival::InOrder
    }

    /// Different sequence numbers received so far.
    pub fn received(&self) -> u64 {
        self.received
    }

    /// The highest sequence number received so far.
    pub fn highest(&self) -> Option<u64> {
        self.next.checked_sub(1)
    }

    /// Copies beyond the first so far.
    pub fn duplicated(&self) -> u64 {
        self.duplicated
    }

    /// The account, given how many packets (sequence numbers from 0) were sent. It can be asked for repeatedly.
    ///
    /// A `sent` below what was received is corrected upwards: what arrived was sent.
    pub fn summary(&self, sent: u64) -> Summary {
        let mut runs = self.settled.clone();
        for first in (self.base..self.next).step_by(64) {
            let (word, _) = self.position(first);
            runs.missing(first, !self.bits[word], (self.next - first).min(64));
        }
        let tail = self.next.max(self.base);
        if sent > tail {
            runs.lost(tail, sent - tail);
        }
        runs.close();
        runs.kept.sort_by_key(|run| run.first);
        Summary {
            received: self.received,
            lost: runs.lost,
            duplicated: self.duplicated,
            reordered: self.reordered,
            stale: self.stale,
            highest: self.highest(),
            longest_run: runs.longest,
            run_count: runs.count,
            runs: runs.kept,
        }
    }

    fn window(&self) -> u64 {
        self.bits.len() as u64 * 64
    }

    fn position(&self, sequence: u64) -> (usize, u64) {
        let word = (sequence / 64 % self.bits.len() as u64) as usize;
        (word, 1 << (sequence % 64))
    }

    /// Moves the window so that `sequence` fits, settling what it leaves behind.
    fn settle_up_to(&mut self, sequence: u64) {
        let base = (sequence - self.window() + 64) / 64 * 64;
        let known = base.min(self.base + self.window());
        while self.base < known {
            let (word, _) = self.position(self.base);
            let missing = !std::mem::take(&mut self.bits[word]);
            self.settled.missing(self.base, missing, 64);
            self.base += 64;
        }
        // A jump beyond the whole window: nothing in between ever had a bit.
        if base > self.base {
            self.settled.lost(self.base, base - self.base);
            self.base = base;
        }
    }
}

impl Runs {
    /// Of the `length` sequence numbers from `first`, those whose bit is set are lost.
    fn missing(&mut self, first: u64, missing: u64, length: u64) {
        if missing == 0 {
            return;
        }
        (0..length)
            .filter(|bit| missing >> bit & 1 == 1)
            .for_each(|bit| self.lost(first + bit, 1));
    }

    /// `count` consecutive sequence numbers from `first`, above all entered before, are lost.
    fn lost(&mut self, first: u64, count: u64) {
        self.lost += count;
        match &mut self.open {
            Some(open) if open.first + open.count == first => open.count += count,
            _ => {
                self.close();
                self.open = Some(Run { first, count });
            }
        }
    }

    fn close(&mut self) {
        let Some(run) = self.open.take() else { return };
        self.count += 1;
        if self.longest.is_none_or(|longest| run.count > longest.count) {
            self.longest = Some(run);
        }
        if self.kept.len() < KEPT_RUNS {
            self.kept.push(run);
        } else if let Some(shortest) = self.kept.iter_mut().min_by_key(|kept| kept.count)
            && shortest.count < run.count
        {
            *shortest = run;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    /// The account as its definition reads, from the list of all arrivals.
    fn oracle(arrivals: &[u64], sent: u64) -> Summary {
        let mut copies: BTreeMap<u64, u64> = BTreeMap::new();
        let mut newest = None;
        let mut reordered = 0;
        for &sequence in arrivals {
            let seen = copies.entry(sequence).or_default();
            *seen += 1;
            if *seen == 1 && newest.is_some_and(|newest| sequence < newest) {
                reordered += 1;
            }
            newest = newest.max(Some(sequence));
        }
        let sent = newest.map_or(sent, |newest| sent.max(newest + 1));
        let mut runs: Vec<Run> = Vec::new();
        for sequence in (0..sent).filter(|sequence| !copies.contains_key(sequence)) {
            match runs.last_mut() {
                Some(run) if run.first + run.count == sequence => run.count += 1,
                _ => runs.push(Run {
                    first: sequence,
                    count: 1,
                }),
            }
        }
        let longest = runs.iter().map(|run| run.count).max();
        Summary {
            received: copies.len() as u64,
            lost: sent - copies.len() as u64,
            duplicated: copies.values().map(|copies| copies - 1).sum(),
            reordered,
            stale: 0,
            highest: newest,
            longest_run: runs.iter().find(|run| Some(run.count) == longest).copied(),
            run_count: runs.len() as u64,
            runs,
        }
    }

    /// Packets 0..n, some dropped in runs, some doubled, some moved back by up to `displacement`.
    fn arrivals(displacement: u64) -> impl Strategy<Value = (Vec<u64>, u64)> {
        (1_u64..600).prop_flat_map(move |sent| {
            let fate = prop_oneof![
                6 => (Just(1_u64), 0..1_u64),
                2 => (Just(0_u64), 0..1_u64),
                1 => (2_u64..4, 0..displacement),
                1 => (Just(1_u64), 0..displacement),
            ];
            prop::collection::vec(fate, usize::try_from(sent).expect("small")).prop_map(
                move |fates| {
                    let mut timed: Vec<(u64, u64)> = Vec::new();
                    for (sequence, &(copies, delay)) in (0_u64..).zip(&fates) {
                        timed.extend(
                            (0..copies)
                                .map(|copy| (sequence + delay + copy * delay.max(1), sequence)),
                        );
                    }
                    timed.sort_by_key(|&(when, _)| when);
                    (
                        timed.into_iter().map(|(_, sequence)| sequence).collect(),
                        sent,
                    )
                },
            )
        })
    }

    proptest! {
        #[test]
        fn agrees_with_the_definition((arrivals, sent) in arrivals(20)) {
            let mut ledger = Ledger::default();
            for &sequence in &arrivals {
                ledger.record(sequence);
            }
            prop_assert_eq!(ledger.summary(sent), oracle(&arrivals, sent));
        }

        // Displaced by at most 3 * 20, so a window of 128 settles a lot but never too early.
        #[test]
        fn settling_changes_nothing((arrivals, sent) in arrivals(20)) {
            let mut ledger = Ledger::with_window(128);
            for &sequence in &arrivals {
                ledger.record(sequence);
            }
            prop_assert_eq!(ledger.summary(sent), oracle(&arrivals, sent));
        }

        #[test]
        fn any_series_of_sequence_numbers_balances(arrivals in prop::collection::vec(0_u64..4096, 0..300)) {
            let mut ledger = Ledger::with_window(64);
            for &sequence in &arrivals {
                ledger.record(sequence);
            }
            let summary = ledger.summary(4096);
            prop_assert_eq!(summary.received + summary.lost, 4096);
            prop_assert_eq!(summary.received + summary.duplicated + summary.stale, arrivals.len() as u64);
        }
    }

    #[test]
    fn a_duplicate_never_cancels_a_loss() {
        let mut ledger = Ledger::default();
        for sequence in [0, 1, 1, 3] {
            ledger.record(sequence);
        }
        let summary = ledger.summary(4);
        assert_eq!(
            (summary.lost, summary.duplicated, summary.reordered),
            (1, 1, 0)
        );
        assert_eq!(summary.longest_run, Some(Run { first: 2, count: 1 }));
    }

    #[test]
    fn an_outage_longer_than_the_window_is_one_run() {
        let mut ledger = Ledger::with_window(64);
        ledger.record(0);
        assert_eq!(ledger.record(100_000), Arrival::InOrder);
        assert_eq!(ledger.record(5), Arrival::Stale);
        let summary = ledger.summary(100_001);
        assert_eq!(
            summary.longest_run,
            Some(Run {
                first: 1,
                count: 99_999
            })
        );
        assert_eq!(
            (summary.received, summary.lost, summary.run_count),
            (2, 99_999, 1)
        );
    }

    #[test]
    fn the_summary_can_be_asked_for_again() {
        let mut ledger = Ledger::default();
        ledger.record(0);
        assert_eq!(ledger.summary(3).lost, 2);
        ledger.record(1);
        assert_eq!(ledger.summary(3).lost, 1);
    }

    #[test]
    fn a_sequence_number_beyond_reach_is_not_believed() {
        let mut ledger = Ledger::default();
        ledger.record(7);
        assert_eq!(ledger.record(u64::MAX), Arrival::Absurd);
        assert_eq!(ledger.highest(), Some(7));
    }
}
