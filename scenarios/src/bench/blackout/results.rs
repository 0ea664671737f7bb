//! What was measured: `segue.bench-blackout/v2`.

use serde::{Deserialize, Serialize};

use super::check::Check;
use super::{Figures, Run};
use crate::report::{Baseline, EarlyOpening, Environment};
use crate::scenario::{Strategy, Topology};

/// The name and version of the format. Within it fields are only ever added.
pub const SCHEMA: &str = "segue.bench-blackout/v2";

/// One bench.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Results {
    /// [`SCHEMA`].
    pub schema: String,
    /// What it ran on.
    pub environment: Environment,
    /// What was offered in each topology.
    #[serde(default)]
    pub rates: Vec<Rate>,
    /// What was measured, by topology and strategy.
    pub rows: Vec<Row>,
    /// Migrations that did not end as they must, and why.
    #[serde(default)]
    pub failures: Vec<Failure>,
    /// Migrations in which the guest or the client did not keep up.
    #[serde(default)]
    pub invalid: Vec<Invalid>,
    /// The claims that these figures are to bear out; none unless it is asked for.
    #[serde(default)]
    pub checks: Vec<Check>,
}

/// What was offered in a topology.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rate {
    /// How the network is laid out.
    pub topology: Topology,
    /// The rate, and what it shows without a migration.
    #[serde(flatten)]
    pub baseline: Baseline,
}

/// One strategy in one topology.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// Who handed the port over.
    pub strategy: Strategy,
    /// How the network is laid out.
    pub topology: Topology,
    /// Migrations that the figures are of.
    pub runs: usize,
    /// Migrations that are not among them: they did not end as they must.
    #[serde(default)]
    pub failed: usize,
    /// Migrations that are not among them either: the guest or the client did not keep up.
    #[serde(default)]
    pub invalid: usize,
    /// STOP on the source to RESUME on the target, from QEMU's own events.
    pub pause_ms: Option<Distribution>,
    /// The longest gap around the pause, less the pause and the guest's wake; not clamped.
    pub network_added_ms: Option<Distribution>,
    /// Packets towards the VM that never arrived.
    pub to_vm_lost: Option<Distribution>,
    /// Packets from the VM that never arrived.
    pub from_vm_lost: Option<Distribution>,
    /// Copies beyond the first, both directions together.
    pub duplicated: Option<Distribution>,
    /// Those of them towards the VM.
    #[serde(default)]
    pub to_vm_duplicated: Option<Distribution>,
    /// Those of them from the VM.
    #[serde(default)]
    pub from_vm_duplicated: Option<Distribution>,
    /// The longest silence of one long TCP stream around the pause.
    pub tcp_stall_ms: Option<Distribution>,
    /// That, less the pause and the guest's wake; not clamped.
    #[serde(default)]
    pub tcp_added_ms: Option<Distribution>,
    /// How agents opened the target's port on the pause.
    #[serde(default)]
    pub early_opening_us: Option<Opening>,
}

/// How agents opened the target's port on the pause, hop by hop, in microseconds: as
/// [`EarlyOpening`](crate::report::EarlyOpening) has them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Opening {
    /// Migrations in which they did.
    pub runs: usize,
    /// From the pause to the source's agent knowing of it.
    pub event: Option<Distribution>,
    /// From there to the target's agent having the order.
    pub stream: Option<Distribution>,
    /// From there to what opens the port having been written.
    pub packet_out: Option<Distribution>,
    /// The three together.
    pub opened: Option<Distribution>,
    /// From there to the switch having processed that.
    pub switch: Option<Distribution>,
    /// The four together: from the pause to the open port.
    #[serde(default)]
    pub open: Option<Distribution>,
    /// From there to the Southbound telling of the activation.
    pub ovn: Option<Distribution>,
}

/// How a figure is distributed over the runs, by nearest rank: each is one that was measured. Of fewer than a hundred runs,
/// the 99th percentile is the greatest.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Distribution {
    /// The median; of an even number of runs the lower of the two in the middle.
    pub p50: f64,
    /// The 99th percentile.
    pub p99: f64,
    /// The greatest.
    pub max: f64,
}

/// A migration that did not end as it must.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// Who handed the port over.
    pub strategy: Strategy,
    /// How the network is laid out.
    pub topology: Topology,
    /// Which of the strategy's migrations it was, from 1.
    pub run: usize,
    /// What went wrong.
    pub error: String,
}

/// A migration in which the guest or the client did not keep up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Invalid {
    /// Who handed the port over.
    pub strategy: Strategy,
    /// How the network is laid out.
    pub topology: Topology,
    /// Which of the strategy's migrations it was, from 1.
    pub run: usize,
    /// Why its figures are not the network's.
    pub reasons: Vec<String>,
}

// === impl Results ===

impl Results {
    /// The figures of the runs so far, in the order of `topologies` and `strategies`.
    pub(super) fn of(
        environment: &Environment,
        baselines: &[(Topology, Baseline)],
        runs: &[Run],
    ) -> Self {
        let mut rows: Vec<Row> = Vec::new();
        for run in runs {
            let same = |row: &Row| (row.strategy, row.topology) == (run.strategy, run.topology);
            if !rows.iter().any(same) {
                rows.push(Row::of(run.strategy, run.topology, runs));
            }
        }
        rows.sort_by_key(|row| (row.topology != Topology::Shared, row.strategy));
        let failures = runs.iter().filter_map(|run| {
            let error = run.measured.as_ref().err()?;
            Some(Failure {
                strategy: run.strategy,
                topology: run.topology,
                run: run.number,
                error: error.clone(),
            })
        });
        let invalid = runs.iter().filter_map(|run| {
            let figures = run.measured.as_ref().ok()?;
            (!figures.invalid.is_empty()).then(|| Invalid {
                strategy: run.strategy,
                topology: run.topology,
                run: run.number,
                reasons: figures.invalid.clone(),
            })
        });
        let rates = baselines.iter().map(|(topology, baseline)| Rate {
            topology: *topology,
            baseline: baseline.clone(),
        });
        Self {
            schema: SCHEMA.to_owned(),
            environment: environment.clone(),
            rates: rates.collect(),
            rows,
            failures: failures.collect(),
            invalid: invalid.collect(),
            checks: Vec::new(),
        }
    }

    /// The topologies that there are figures of, in order.
    pub fn topologies(&self) -> impl Iterator<Item = Topology> {
        [Topology::Shared, Topology::Routed]
            .into_iter()
            .filter(|topology| self.rows.iter().any(|row| row.topology == *topology))
    }

    /// Packets a second that were offered in a topology; the usual rate where that is not known.
    pub fn rate_hz(&self, topology: Topology) -> u32 {
        let mut rates = self.rates.iter();
        let rate = rates.find(|rate| rate.topology == topology);
        rate.map_or(1_000, |rate| rate.baseline.rate_hz)
    }

    /// Whether every migration ended as it must, and enough of each strategy's are valid to speak of them.
    pub fn is_sound(&self) -> bool {
        self.failures.is_empty() && self.rows.iter().all(Row::is_sound)
    }

    /// The row of a strategy in a topology.
    pub fn row(&self, topology: Topology, strategy: Strategy) -> Option<&Row> {
        let mut rows = self.rows.iter();
        rows.find(|row| (row.topology, row.strategy) == (topology, strategy))
    }

    /// What the others are compared with: the best of segue that was measured in a topology.
    pub fn reference(&self, topology: Topology) -> Option<&Row> {
        let best = [Strategy::Segue, Strategy::SegueAgentless];
        best.into_iter()
            .find_map(|strategy| self.row(topology, strategy).filter(|row| row.runs > 0))
    }
}

// === impl Row ===

impl Row {
    fn of(strategy: Strategy, topology: Topology, runs: &[Run]) -> Self {
        let own = runs.iter();
        let own = own.filter(|run| (run.strategy, run.topology) == (strategy, topology));
        let failed = own.clone().filter(|run| run.measured.is_err()).count();
        let ended = own.clone().count() - failed;
        let measured: Vec<_> = own.filter_map(Run::valid).collect();
        let of = |figure: fn(&Figures) -> Option<f64>| {
            Distribution::of(measured.iter().filter_map(|figures| figure(figures)))
        };
        Self {
            strategy,
            topology,
            runs: measured.len(),
            failed,
            invalid: ended - measured.len(),
            pause_ms: of(|figures| figures.pause_ms),
            network_added_ms: of(|figures| figures.network_added_ms),
            to_vm_lost: of(|figures| Some(count(figures.to_vm_lost))),
            from_vm_lost: of(|figures| Some(count(figures.from_vm_lost))),
            duplicated: of(|figures| {
                Some(count(figures.to_vm_duplicated + figures.from_vm_duplicated))
            }),
            to_vm_duplicated: of(|figures| Some(count(figures.to_vm_duplicated))),
            from_vm_duplicated: of(|figures| Some(count(figures.from_vm_duplicated))),
            tcp_stall_ms: of(|figures| figures.tcp_stall_ms),
            tcp_added_ms: of(|figures| figures.tcp_added_ms),
            early_opening_us: Opening::of(measured.iter().copied()),
        }
    }

    /// Whether at least half of the migrations that ended as they must are valid.
    pub fn is_sound(&self) -> bool {
        self.runs >= self.invalid
    }
}

// === impl Opening ===

impl Opening {
    /// None where agents opened no port.
    fn of<'a>(figures: impl Iterator<Item = &'a Figures>) -> Option<Self> {
        let openings = figures.filter_map(|figures| figures.opening.as_ref());
        let openings: Vec<_> = openings.filter(|opening| opening.is_opened()).collect();
        let of = |hop: fn(&EarlyOpening) -> Option<i64>| {
            let hops = openings.iter().filter_map(|opening| hop(opening));
            Distribution::of(hops.map(micros))
        };
        (!openings.is_empty()).then(|| Self {
            runs: openings.len(),
            event: of(|opening| opening.event),
            stream: of(|opening| opening.stream),
            packet_out: of(|opening| opening.packet_out),
            opened: of(|opening| opening.opened),
            switch: of(|opening| opening.switch),
            open: of(|opening| opening.open),
            ovn: of(|opening| opening.ovn),
        })
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "a hop of one migration is far below 2^52 microseconds"
)]
fn micros(hop: i64) -> f64 {
    hop as f64
}

#[expect(
    clippy::cast_precision_loss,
    reason = "packets of one run are far below 2^52"
)]
pub(super) fn count(packets: u64) -> f64 {
    packets as f64
}

// === impl Distribution ===

impl Distribution {
    /// None where there are no values.
    pub(super) fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let rank = |percent: usize| {
            let rank = (values.len() * percent).div_ceil(100);
            values.get(rank.checked_sub(1)?).copied()
        };
        Some(Self {
            p50: rank(50)?,
            p99: rank(99)?,
            max: rank(100)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::samples::{figures, run, runs};
    use super::*;

    #[test]
    fn percentiles_are_values_that_were_measured() {
        let of = |count: u32| Distribution::of((1..=count).rev().map(f64::from)).unwrap();
        let is = |p50, p99, max| Distribution { p50, p99, max };
        assert_eq!(of(1), is(1.0, 1.0, 1.0));
        assert_eq!(of(2), is(1.0, 2.0, 2.0));
        assert_eq!(of(20), is(10.0, 20.0, 20.0));
        assert_eq!(of(200), is(100.0, 198.0, 200.0));
        assert_eq!(Distribution::of([]), None);
        assert_eq!(Distribution::of([-1.5, -3.0]), Some(is(-3.0, -1.5, -1.5)));
    }

    #[test]
    fn openings_are_of_those_migrations_in_which_there_was_one() {
        let with = |result: &str, opened| {
            let mut figures = figures(80.0, 0.0, 0);
            figures.opening = Some(EarlyOpening {
                result: result.to_owned(),
                opened,
                ..EarlyOpening::default()
            });
            run(Strategy::Segue, figures)
        };
        let runs = [
            with("Opened", Some(700)),
            with("Opened", Some(900)),
            with("NoAgent", None),
        ];
        let results = Results::of(&Environment::default(), &[], &runs);
        let opening = results.rows[0].early_opening_us.clone().unwrap();
        assert_eq!(opening.runs, 2);
        assert_eq!(
            opening.opened.map(|it| (it.p50, it.max)),
            Some((700.0, 900.0))
        );
        assert_eq!(opening.event, None);
        let none = Results::of(&Environment::default(), &[], &super::super::samples::runs());
        assert!(none.rows.iter().all(|row| row.early_opening_us.is_none()));
    }

    #[test]
    fn the_format_is_what_its_readers_expect() {
        let results = Results::of(&Environment::default(), &[], &runs());
        let json = serde_json::to_value(&results).unwrap();
        assert_eq!(json["schema"], "segue.bench-blackout/v2");
        assert!(json["environment"].is_object());
        let rows = json["rows"].as_array().unwrap();
        let first = rows.first().unwrap();
        assert_eq!(first["strategy"], "segue");
        assert_eq!(first["topology"], "shared");
        assert_eq!(first["runs"], 3);
        for column in [
            "pause_ms",
            "network_added_ms",
            "to_vm_lost",
            "from_vm_lost",
            "duplicated",
            "tcp_stall_ms",
        ] {
            for point in ["p50", "p99", "max"] {
                assert!(first[column][point].is_number(), "{column} {point}");
            }
        }
        let back: Results = serde_json::from_value(json).unwrap();
        assert_eq!(back, results);
    }

    #[test]
    fn a_failed_run_is_counted_and_its_figures_are_in_no_distribution() {
        let mut runs = vec![run(Strategy::Single, figures(80.0, 0.0, 5))];
        runs.push(Run {
            number: 2,
            measured: Err("the guest does not answer".to_owned()),
            ..runs[0].clone()
        });
        let results = Results::of(&Environment::default(), &[], &runs);
        let row = results.row(Topology::Shared, Strategy::Single).unwrap();
        assert_eq!((row.runs, row.failed), (1, 1));
        assert_eq!(row.to_vm_lost.map(|lost| lost.max), Some(5.0));
        let failure = &results.failures[0];
        assert_eq!((failure.run, failure.strategy), (2, Strategy::Single));
        assert_eq!(failure.error, "the guest does not answer");
    }

    #[test]
    fn an_invalid_run_is_counted_and_half_of_them_have_to_be_valid() {
        let invalid = |run: Run| Run {
            measured: run.measured.map(|figures| Figures {
                invalid: vec!["the guest was late".to_owned()],
                ..figures
            }),
            ..run
        };
        let good = || run(Strategy::Segue, figures(80.0, 0.0, 1));
        let mut runs = vec![
            good(),
            invalid(run(Strategy::Segue, figures(80.0, 0.0, 500))),
        ];
        let results = Results::of(&Environment::default(), &[], &runs);
        let row = &results.rows[0];
        assert_eq!((row.runs, row.invalid, row.failed), (1, 1, 0));
        assert_eq!(row.to_vm_lost.map(|lost| lost.max), Some(1.0));
        assert_eq!(results.invalid[0].reasons, ["the guest was late"]);
        assert!(results.is_sound());
        runs.push(invalid(good()));
        assert!(!Results::of(&Environment::default(), &[], &runs).is_sound());
    }

    #[test]
    fn a_strategy_that_always_fails_has_a_row_without_figures() {
        let only = Run {
            measured: Err("no".to_owned()),
            ..run(Strategy::Clone, figures(1.0, 1.0, 1))
        };
        let results = Results::of(&Environment::default(), &[], &[only]);
        let row = results.row(Topology::Shared, Strategy::Clone).unwrap();
        assert_eq!((row.runs, row.failed, row.pause_ms), (0, 1, None));
    }

    #[test]
    fn the_reference_is_the_best_of_segue_that_there_are_figures_of() {
        let agentless = run(Strategy::SegueAgentless, figures(80.0, 10.0, 90));
        let mut all = vec![agentless, run(Strategy::KubeOvn, figures(80.0, 12.0, 95))];
        let reference = |runs: &[Run]| {
            let results = Results::of(&Environment::default(), &[], runs);
            results.reference(Topology::Shared).map(|row| row.strategy)
        };
        assert_eq!(reference(&all), Some(Strategy::SegueAgentless));
        all.push(run(Strategy::Segue, figures(80.0, 0.0, 0)));
        assert_eq!(reference(&all), Some(Strategy::Segue));
        assert_eq!(reference(&all[1..2]), None);
    }
}
