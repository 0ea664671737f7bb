//! What the figures are to bear out of `segue`.

use serde::{Deserialize, Serialize};

use super::results::{Distribution, Results, Row};
use crate::scenario::{Strategy, Topology};

/// Migrations that the claims are made of.
pub const LEAST_RUNS: usize = 20;
/// Of so many runs one may be invalid.
const INVALID_ONE_IN: usize = 10;
/// For how many milliseconds packets towards the VM are lost at most, in the median and in the 99th percentile.
const MOST_LOST_MS: (f64, f64) = (1.0, 3.0);
/// Most microseconds from the pause to the open port, in the median and in the 99th percentile.
const MOST_OPEN_US: (f64, f64) = (1_000.0, 5_000.0);

/// A claim, and whether it held.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// What is claimed.
    pub what: String,
    /// What was found.
    pub found: String,
    /// Whether it held.
    pub passed: bool,
}

impl Results {
    /// Holds the claims for strategy `segue` against the figures, in each topology that was measured.
    pub fn check(&mut self) {
        let mut checks = Vec::new();
        for topology in self.topologies() {
            match self.row(topology, Strategy::Segue) {
                Some(segue) => {
                    itself(&mut checks, segue, self.rate_hz(topology));
                    for row in self.rows.iter().filter(|row| row.topology == topology) {
                        if !row.strategy.is_segue() {
                            below(&mut checks, segue, row);
                        }
                    }
                }
                None => checks.push(Check {
                    what: format!("{}: segue is among the strategies", named(topology)),
                    found: "it was not measured".to_owned(),
                    passed: false,
                }),
            }
        }
        self.checks = checks;
    }
}

/// What is claimed of segue whoever else there is.
fn itself(checks: &mut Vec<Check>, segue: &Row, rate_hz: u32) {
    let topology = named(segue.topology);
    let migrated = segue.runs + segue.invalid;
    checks.push(Check {
        what: format!(
            "{topology}: segue migrates {LEAST_RUNS} times at least, never fails, and {} in {INVALID_ONE_IN} runs are \
             valid",
            INVALID_ONE_IN - 1
        ),
        found: format!(
            "{migrated} times, of which {} are invalid, and {} failed",
            segue.invalid, segue.failed
        ),
        passed: migrated >= LEAST_RUNS
            && segue.failed == 0
            && segue.invalid * INVALID_ONE_IN <= migrated,
    });
    // What is sent in that time at this rate, and the one packet that may fall into it however slow the rate is.
    let packets = |ms: f64| (ms * f64::from(rate_hz) / 1_000.0).floor().max(1.0);
    let (median, most) = (packets(MOST_LOST_MS.0), packets(MOST_LOST_MS.1));
    let [lost50, lost99, _] = points(segue.to_vm_lost);
    let [.., lost_from] = points(segue.from_vm_lost);
    let [.., twice] = points(segue.duplicated);
    let opening = segue.early_opening_us.as_ref();
    let [open50, open99, _] = points(opening.and_then(|opening| opening.open));
    let (open_median, open_most) = MOST_OPEN_US;
    for (what, value, limit) in [
        ("p50 of segue's packets lost towards the VM", lost50, median),
        ("p99 of segue's packets lost towards the VM", lost99, most),
        ("max of segue's packets lost from the VM", lost_from, 0.0),
        ("max of segue's duplicates", twice, 0.0),
        (
            "p50 of the µs from the pause to segue's open port",
            open50,
            open_median,
        ),
        (
            "p99 of the µs from the pause to segue's open port",
            open99,
            open_most,
        ),
    ] {
        checks.push(Check {
            what: format!("{topology}: {what} is at most {limit}"),
            found: shown(value),
            passed: value.is_some_and(|value| value <= limit),
        });
    }
}

/// segue's loss and added downtime have to be below another's, in the median. Below no loss at all there is nothing: it is
/// enough to lose none either.
fn below(checks: &mut Vec<Check>, segue: &Row, other: &Row) {
    let medians = |own: Option<Distribution>, others: Option<Distribution>| {
        own.zip(others).map(|(own, others)| (own.p50, others.p50))
    };
    let lost = medians(segue.to_vm_lost, other.to_vm_lost);
    let added = medians(segue.network_added_ms, other.network_added_ms);
    let is_below = |(own, others): (f64, f64)| own < others;
    let loses_none = |(own, others): (f64, f64)| own <= 0.0 && others <= 0.0;
    for (what, medians, passed) in [
        (
            "packets lost towards the VM",
            lost,
            lost.is_some_and(|both| is_below(both) || loses_none(both)),
        ),
        ("network-added downtime", added, added.is_some_and(is_below)),
    ] {
        let (topology, strategy) = (named(segue.topology), other.strategy);
        checks.push(Check {
            what: format!("{topology}: the median of segue's {what} is below that of {strategy}"),
            found: medians.map_or_else(
                || "not measured".to_owned(),
                |(own, others)| format!("{own:.1} and {others:.1}"),
            ),
            passed,
        });
    }
}

fn points(distribution: Option<Distribution>) -> [Option<f64>; 3] {
    let points = distribution.map(|Distribution { p50, p99, max }| [p50, p99, max]);
    points.map_or([None; 3], |points| points.map(Some))
}

fn shown(value: Option<f64>) -> String {
    value.map_or_else(|| "not measured".to_owned(), |value| value.to_string())
}

/// As scenario files and results name it.
pub(super) fn named(topology: Topology) -> &'static str {
    match topology {
        Topology::Shared => "shared",
        Topology::Routed => "routed",
    }
}

#[cfg(test)]
mod tests {
    use super::super::Run;
    use super::super::samples::{figures, run};
    use super::*;
    use crate::report::{EarlyOpening, Environment};

    /// A run of segue whose agent opened the port so many microseconds after the pause.
    fn opened(added: f64, lost: u64, open: i64) -> Run {
        let mut figures = figures(80.0, added, lost);
        figures.opening = Some(EarlyOpening {
            result: "Opened".to_owned(),
            open: Some(open),
            ..EarlyOpening::default()
        });
        run(Strategy::Segue, figures)
    }

    /// What does not hold, of so many runs of segue that lost these, and of one of each other.
    fn failed(segue: &[u64], others: &[(Strategy, u64)]) -> Vec<String> {
        let own = segue.iter().map(|&lost| opened(1.0, lost, 900));
        let others = others.iter().map(|&(strategy, lost)| {
            let added = 10.0;
            run(strategy, figures(80.0, added, lost))
        });
        let runs: Vec<Run> = own.chain(others).collect();
        let mut results = Results::of(&Environment::default(), &[], &runs);
        results.check();
        let failed = results.checks.into_iter().filter(|check| !check.passed);
        failed.map(|check| check.what).collect()
    }

    #[test]
    fn the_claims_hold_up_to_their_limits_and_not_beyond() {
        let peers = [(Strategy::KubeOvn, 90), (Strategy::Single, 2_000)];
        let mut lost = [1; 20];
        lost[19] = 3;
        assert_eq!(failed(&lost, &peers), Vec::<String>::new());
        lost[18] = 4;
        assert_eq!(
            failed(&lost, &peers),
            ["shared: p99 of segue's packets lost towards the VM is at most 3"]
        );
        assert_eq!(failed(&[2; 20], &peers).len(), 1, "the median");
        assert_eq!(failed(&[0; 19], &peers).len(), 1, "too few");
    }

    #[test]
    fn segue_has_to_be_below_every_peer_but_nothing_is_below_none() {
        let not_below = |lost| failed(&[1; 20], &[(Strategy::Clone, lost)]).len();
        assert_eq!((not_below(0), not_below(1), not_below(2)), (1, 1, 0));
        assert!(failed(&[0; 20], &[(Strategy::Clone, 0)]).is_empty());
        // Its own, without agents, is no peer.
        assert!(failed(&[1; 20], &[(Strategy::SegueAgentless, 0)]).is_empty());
    }

    #[test]
    fn duplicates_losses_from_the_vm_and_failures_are_not_allowed() {
        let good = || vec![opened(1.0, 0, 900); 20];
        let failed = |runs: &[Run]| {
            let mut results = Results::of(&Environment::default(), &[], runs);
            results.check();
            results.checks.iter().filter(|check| !check.passed).count()
        };
        assert_eq!(failed(&good()), 0);
        let spoil = |spoil: fn(&mut Run)| {
            let mut runs = good();
            spoil(&mut runs[7]);
            failed(&runs)
        };
        assert_eq!(
            spoil(|run| run.measured.as_mut().unwrap().from_vm_lost = 1),
            1
        );
        assert_eq!(
            spoil(|run| run.measured.as_mut().unwrap().from_vm_duplicated = 1),
            1
        );
        assert_eq!(spoil(|run| run.measured = Err("no".to_owned())), 1);
    }

    #[test]
    fn the_port_has_to_be_open_soon_after_the_pause() {
        let failed = |late: i64, latest: i64| {
            let mut runs = vec![opened(1.0, 0, late); 19];
            runs.push(opened(1.0, 0, latest));
            let mut results = Results::of(&Environment::default(), &[], &runs);
            results.check();
            results.checks.iter().filter(|check| !check.passed).count()
        };
        assert_eq!(failed(1_000, 5_000), 0);
        assert_eq!(failed(1_001, 5_000), 1);
        assert_eq!(failed(1_000, 5_001), 1);
    }

    #[test]
    fn without_segue_the_claims_do_not_hold() {
        let mut results = Results::of(
            &Environment::default(),
            &[],
            &[run(Strategy::KubeOvn, figures(80.0, 1.0, 0))],
        );
        results.check();
        assert_eq!(results.checks.len(), 1);
        assert!(!results.checks[0].passed);
    }
}
