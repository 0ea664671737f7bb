//! What the guest's peers see of a live migration, by who hands its port over.
//!
//! # What is measured
//! Real migrations of a real guest, between the same two nodes, each seen by a probe that sends both ways from a third, at
//! the rate that the guest carries at ease. In each topology there is one lab, and in it one guest for strategies that hand the VM's port
//! over, and one for those that give every pod its own; only one of them moves at a time, and the other idles.
//!
//! # Guarantees
//! - The strategies take turns: what drifts on the machine hits all alike. Each goes there as often as back, and who goes
//!   before whom changes.
//! - Every migration is counted: one that did not end as it must is among the failures, with the reason, and the guest is
//!   started anew. One in which the guest or the client did not keep up is among the invalid ones, and in no figure.
//!
//! # Caveats
//! - What a peer's own software takes to act on a sign is left out (`runner/strategy`).
//! - The flow that is measured is the one inside, which in the routed topology crosses the cluster router and no gateway.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::cluster::Parts;
use crate::lab::{Lab, Progress};
use crate::report::{Baseline, EarlyOpening, Environment, Migration};
use crate::runner::{Contest, Switch};
use crate::scenario::{Strategy, Topology};

mod check;
mod files;
mod order;
mod picture;
mod plot;
mod results;
#[cfg(test)]
mod samples;
mod table;

pub use check::{Check, LEAST_RUNS};
pub use files::{remove_old, write};
pub use picture::Picture;
pub use plot::plot;
pub use results::{Distribution, Failure, Invalid, Rate, Results, Row, SCHEMA};
pub use table::render;

/// What one migration takes with what is around it, until it is known: for the first estimate.
const ABOUT: Duration = Duration::from_secs(14);

/// What is to be measured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlackoutSpec {
    /// Who hands over, in turn.
    pub strategies: Vec<Strategy>,
    /// How the network is laid out, one after the other.
    pub topologies: Vec<Topology>,
    /// Migrations of each strategy in each topology.
    pub runs: usize,
}

/// What has been measured so far.
#[derive(Clone, Debug, Default)]
pub struct Measured {
    environment: Environment,
    /// What the first guest carried without a migration, in each topology.
    baselines: Vec<(Topology, Baseline)>,
    /// Every migration, in the order in which it happened.
    runs: Vec<Run>,
    /// When the first began, and how many there have been and are to be in all.
    begun: Option<Instant>,
}

/// One migration.
#[derive(Clone, Debug)]
pub(crate) struct Run {
    pub(crate) strategy: Strategy,
    pub(crate) topology: Topology,
    /// Which of the strategy's in this topology it was, from 1.
    pub(crate) number: usize,
    /// What was measured, or why nothing was.
    pub(crate) measured: Result<Figures, String>,
}

/// What was measured of one migration.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Figures {
    pub(crate) source: String,
    pub(crate) target: String,
    pub(crate) pause_ms: Option<f64>,
    pub(crate) guest_wake_ms: Option<f64>,
    pub(crate) network_added_ms: Option<f64>,
    pub(crate) to_vm_lost: u64,
    pub(crate) from_vm_lost: u64,
    pub(crate) to_vm_duplicated: u64,
    pub(crate) from_vm_duplicated: u64,
    /// Around the pause.
    pub(crate) tcp_stall_ms: Option<f64>,
    pub(crate) tcp_added_ms: Option<f64>,
    /// From the pause, in milliseconds.
    pub(crate) activated_ms: Option<f64>,
    pub(crate) flipped_ms: Option<f64>,
    /// The longest gap of the whole run in each direction.
    pub(crate) to_vm_gap_ms: Option<f64>,
    pub(crate) from_vm_gap_ms: Option<f64>,
    pub(crate) opening: Option<EarlyOpening>,
    /// Why the figures are not the network's.
    pub(crate) invalid: Vec<String>,
    pub(crate) picture: Option<Picture>,
}

// === impl BlackoutSpec ===

impl BlackoutSpec {
    /// # Errors
    /// When it cannot be run as it is.
    pub fn validate(&self) -> Result<()> {
        ensure!(self.runs > 0, "give a number of runs");
        ensure!(!self.topologies.is_empty(), "give a topology");
        ensure!(!self.strategies.is_empty(), "give a strategy");
        let strategies: BTreeSet<_> = self.strategies.iter().collect();
        ensure!(
            strategies.len() == self.strategies.len(),
            "give each strategy once"
        );
        let topologies: BTreeSet<_> = self.topologies.iter().map(|it| check::named(*it)).collect();
        ensure!(
            topologies.len() == self.topologies.len(),
            "give each topology once"
        );
        Ok(())
    }

    /// How many migrations that makes.
    pub fn migrations(&self) -> usize {
        self.strategies.len() * self.topologies.len() * self.runs
    }
}

/// Runs the bench in one topology, on a lab that is fresh. The calling process is in central's network namespace. What has
/// been measured stays when this is dropped half way. `done` is called after every migration.
///
/// # Errors
/// When the lab fails, or `done` does. A migration that fails is no error.
pub async fn run(
    lab: &Lab,
    parts: &Parts,
    spec: &BlackoutSpec,
    topology: Topology,
    measured: &mut Measured,
    progress: &dyn Progress,
    mut done: impl FnMut(&Measured) -> Result<()>,
) -> Result<()> {
    let mut contest = Contest::start(lab, parts, topology, &spec.strategies, progress).await?;
    measured.environment = contest.environment().clone();
    let baseline = contest.baseline(progress).await?.clone();
    measured.baselines.push((topology, baseline));
    for round in 0..spec.runs {
        for strategy in order::of_round(&spec.strategies, round) {
            let left = measured.left(spec.migrations());
            progress.step(&format!(
                "{}, {strategy}, {} of {}: {} of {} migrations, {left}",
                check::named(topology),
                round + 1,
                spec.runs,
                measured.runs.len() + 1,
                spec.migrations(),
            ));
            let say = |what: &str| {
                progress.step(&format!("{}, {strategy}: {what}", check::named(topology)));
            };
            let switched = contest.migrate(strategy, progress).await;
            let run = Run {
                strategy,
                topology,
                number: round + 1,
                measured: match switched {
                    Ok(switch) => Ok(Figures::of(&switch)),
                    Err(error) => Err(format!("{error:#}")),
                },
            };
            match &run.measured {
                Err(error) => say(&format!("FAILED: {error}")),
                Ok(figures) if !figures.invalid.is_empty() => {
                    say(&format!("invalid: {}", figures.invalid.join("; ")));
                }
                Ok(_) => {}
            }
            measured.runs.push(run);
            done(measured)?;
        }
    }
    contest.stop().await
}

// === impl Measured ===

impl Measured {
    /// The figures.
    pub fn results(&self) -> Results {
        Results::of(&self.environment, &self.baselines, &self.runs)
    }

    /// Whether there is nothing yet.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// The picture of each strategy in a topology that has one: the migration that lost as much as the median of its
    /// strategy does, or is nearest to that.
    pub fn pictures(&self, topology: Topology) -> Vec<&Picture> {
        let results = self.results();
        let rows = results.rows.iter().filter(|row| row.topology == topology);
        rows.filter_map(|row| {
            let median = row.to_vm_lost?.p50;
            let own = self.runs.iter();
            let own = own.filter(|run| (run.strategy, run.topology) == (row.strategy, topology));
            let figures = own.filter_map(Run::valid);
            let pictures =
                figures.filter_map(|figures| Some((figures.to_vm_lost, figures.picture.as_ref()?)));
            let off = |lost: u64| (results::count(lost) - median).abs();
            let nearest = pictures.min_by(|(one, _), (other, _)| off(*one).total_cmp(&off(*other)));
            nearest.map(|(_, picture)| picture)
        })
        .collect()
    }

    /// How long the rest takes, for people.
    fn left(&mut self, migrations: usize) -> String {
        let begun = *self.begun.get_or_insert_with(Instant::now);
        let left = migrations.saturating_sub(self.runs.len());
        let each = match u32::try_from(self.runs.len()) {
            Ok(done @ 1..) => begun.elapsed() / done,
            _ => ABOUT,
        };
        let left = each.saturating_mul(u32::try_from(left).unwrap_or(u32::MAX));
        format!("about {} min left", left.as_secs().div_ceil(60))
    }
}

// === impl Run ===

impl Run {
    /// What was measured, where it counts.
    pub(crate) fn valid(&self) -> Option<&Figures> {
        let figures = self.measured.as_ref().ok();
        figures.filter(|figures| figures.invalid.is_empty())
    }
}

// === impl Figures ===

impl Figures {
    fn of(switch: &Switch) -> Self {
        let Migration {
            source,
            target,
            pause_ms,
            guest_wake_ms,
            network_added_ms,
            to_vm,
            from_vm,
            tcp,
            timeline_us,
            early_opening,
            invalid,
            ..
        } = &switch.migration;
        Self {
            source: source.clone(),
            target: target.clone(),
            pause_ms: *pause_ms,
            guest_wake_ms: *guest_wake_ms,
            network_added_ms: *network_added_ms,
            to_vm_lost: to_vm.lost,
            from_vm_lost: from_vm.lost,
            to_vm_duplicated: to_vm.duplicated,
            from_vm_duplicated: from_vm.duplicated,
            tcp_stall_ms: tcp.stall_ms,
            tcp_added_ms: tcp.added_ms,
            activated_ms: timeline_us.activated.map(picture::millis),
            flipped_ms: timeline_us.flipped.map(picture::millis),
            to_vm_gap_ms: to_vm.service_gap_ms,
            from_vm_gap_ms: from_vm.service_gap_ms,
            opening: early_opening.clone(),
            invalid: invalid.clone(),
            picture: Picture::of(switch),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::samples::{figures, run};
    use super::*;

    fn spec() -> BlackoutSpec {
        BlackoutSpec {
            strategies: vec![Strategy::SegueAgentless, Strategy::Single],
            topologies: vec![Topology::Shared, Topology::Routed],
            runs: 20,
        }
    }

    #[test]
    fn what_cannot_be_run_is_refused() {
        spec().validate().unwrap();
        assert_eq!(spec().migrations(), 80);
        let twice = vec![Strategy::Clone, Strategy::Single, Strategy::Clone];
        for wrong in [
            BlackoutSpec { runs: 0, ..spec() },
            BlackoutSpec {
                topologies: Vec::new(),
                ..spec()
            },
            BlackoutSpec {
                strategies: Vec::new(),
                ..spec()
            },
            BlackoutSpec {
                strategies: twice,
                ..spec()
            },
            BlackoutSpec {
                topologies: vec![Topology::Shared; 2],
                ..spec()
            },
        ] {
            assert!(wrong.validate().is_err(), "{wrong:?} was accepted");
        }
    }

    #[test]
    fn the_picture_is_that_of_the_run_nearest_to_the_median() {
        let lost = [100, 7, 9, 8];
        let runs = lost.map(|lost| {
            let mut figures = figures(80.0, 1.0, lost);
            figures.picture = Some(Picture {
                to_vm: picture::Way {
                    lost: vec![1.0; usize::try_from(lost).unwrap()],
                    ..picture::Way::default()
                },
                ..Picture::empty(Strategy::KubeOvn, Topology::Shared)
            });
            if lost == 8 {
                figures.invalid = vec!["the guest was late".to_owned()];
            }
            run(Strategy::KubeOvn, figures)
        });
        let measured = Measured {
            runs: runs.to_vec(),
            ..Measured::default()
        };
        let pictures = measured.pictures(Topology::Shared);
        assert_eq!(pictures.len(), 1);
        assert_eq!(pictures[0].to_vm.lost.len(), 9);
        assert!(measured.pictures(Topology::Routed).is_empty());
    }

    #[test]
    fn the_rest_is_estimated_from_the_first_on() {
        let mut measured = Measured::default();
        assert_eq!(measured.left(60), "about 14 min left");
        measured.begun = Instant::now().checked_sub(Duration::from_secs(125));
        measured.runs = vec![run(Strategy::Clone, figures(1.0, 1.0, 1)); 10];
        assert_eq!(measured.left(20), "about 3 min left");
    }
}
