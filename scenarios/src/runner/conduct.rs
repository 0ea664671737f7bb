//! Who hands the ports over in a migration, and how that ends: segue, or a peer's writes in its place.

use std::time::SystemTime;

use anyhow::{Context as _, Result, bail};
use kube::Api;
use migration_controller::api::{EarlyOpening, Handover, HandoverStatus, TimelineStep};
use tokio::task::JoinSet;

use crate::cluster::{Hook, Segue};
use crate::lab::Nic;
use crate::scenario::{Moment, Outcome, Strategy};

use super::Bench;
use super::feeders::Followed;
use super::moments::Moments;
use super::ovn::{Ovn, PortView};
use super::strategy::{self, Baseline, Northbound, Seen, Signs, Stage};
use super::vm::RunningVm;

/// Whoever hands the ports over, ready for a migration that does not exist yet.
pub(super) enum Conduct {
    /// segue, which runs beside the runner.
    Segue,
    /// A peer's writes.
    Replay(Box<Replay>),
}

/// A peer's writes, and what they go by.
pub(super) struct Replay {
    baseline: Box<dyn Baseline>,
    stage: Stage,
    signs: Signs,
    watches: JoinSet<Result<()>>,
    /// The VM's interfaces.
    nics: Vec<Nic>,
}

/// How a handover ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Ending {
    pub outcome: Outcome,
    /// Target and peers had caught up; of segue only.
    pub ready: Option<SystemTime>,
    /// Nothing was left to do.
    pub finalised: Option<SystemTime>,
    /// How agents opened the target's ports; of segue only.
    pub opening: Option<EarlyOpening>,
}

/// What of segue runs while ports are handed over so; agents, if any, with this gate.
pub(super) fn segue_of(strategy: Strategy, hook: Hook) -> Segue {
    match strategy {
        Strategy::Segue => Segue::WithAgents(hook),
        Strategy::SegueAgentless => Segue::Controller,
        _ => Segue::Nothing,
    }
}

// === impl Conduct ===

impl Conduct {
    /// Gets ready: from here on nothing that a peer goes by is missed.
    pub(super) async fn prepare(
        bench: &Bench<'_>,
        vm: &RunningVm,
        followed: &Followed,
        moments: &Moments,
    ) -> Result<Self> {
        let Some(baseline) = strategy::baseline(bench.strategy) else {
            return Ok(Self::Segue);
        };
        let events = bench.cluster.hypervisor.raw_events();
        let (signs, watches) = strategy::follow(followed, &bench.cluster.client(), events);
        let stage = Stage {
            north: Northbound::connect(&bench.lab.nb_endpoint()).await?,
            ports: followed.ports.clone(),
            source: followed.source.clone(),
            target: followed.target.clone(),
            topology: vm.layout.topology,
            moments: moments.clone(),
        };
        Ok(Self::Replay(Box::new(Replay {
            baseline,
            stage,
            signs,
            watches,
            nics: vm.nics.clone(),
        })))
    }

    /// Returns once the migration and what follows it are over.
    pub(super) async fn until_over(
        self,
        bench: &Bench<'_>,
        followed: &Followed,
        moments: &Moments,
    ) -> Result<Ending> {
        match self {
            Self::Segue => {
                moments.wait(Moment::Ended).await;
                let handover = handover_ends(bench, followed).await?;
                Ending::of(&handover)
            }
            Self::Replay(replay) => {
                let ending = replay.until_over(bench).await?;
                moments.wait(Moment::Ended).await;
                Ok(ending)
            }
        }
    }
}

// === impl Replay ===

impl Replay {
    async fn until_over(self, bench: &Bench<'_>) -> Result<Ending> {
        let Self {
            baseline,
            stage,
            mut signs,
            mut watches,
            nics,
        } = self;
        let strategy = bench.strategy;
        let replaying = async {
            let replayed = baseline.replay(&stage, signs.clone()).await;
            replayed.with_context(|| format!("strategy {strategy}"))?;
            anyhow::Ok(signs.until(Seen::is_over).await?)
        };
        let seen = tokio::select! {
            seen = replaying => seen?,
            Some(failed) = watches.join_next() => {
                failed.context("a watch")??;
                bail!("a watch ended before the migration did");
            }
        };
        let (outcome, place, left) = if seen.succeeded() {
            (Outcome::Succeeded, &stage.target, &stage.source)
        } else {
            (Outcome::RolledBack, &stage.source, &stage.target)
        };
        at_rest(bench.ovn, &stage.ports, place).await;
        // A port that is bound elsewhere may still have its interface where the guest is no more, and the guest may be
        // on its way back soon.
        bench.cluster.hypervisor.unplugged(left, &nics).await;
        Ok(Ending {
            outcome,
            ready: None,
            finalised: Some(SystemTime::now()),
            opening: None,
        })
    }
}

/// Returns once every port is bound to this chassis alone, asks for no other, and has no second one of another pod's.
async fn at_rest(ovn: &Ovn, ports: &[String], chassis: &str) {
    let mut changed = ovn.changed();
    let rests = |port: &String| {
        let view = ovn.port(port);
        view.is_some_and(|view| is_alone(&view, chassis)) && ovn.names(port).len() == 1
    };
    while !ports.iter().all(rests) {
        changed.next().await;
    }
}

fn is_alone(view: &PortView, chassis: &str) -> bool {
    let here = view.chassis.as_deref() == Some(chassis);
    here && view.additional.is_empty() && view.requested == [chassis]
}

// === impl Ending ===

impl Ending {
    fn of(handover: &Handover) -> Result<Self> {
        let status = handover.status.as_ref();
        let status = status.context("a handover without status")?;
        let (outcome, last) = match status.phase {
            handover::Phase::Succeeded => (Outcome::Succeeded, TimelineStep::Succeeded),
            handover::Phase::RolledBack => (Outcome::RolledBack, TimelineStep::RolledBack),
            _ => (Outcome::Failed, TimelineStep::RolledBack),
        };
        let step = |step| {
            let at = HandoverStatus::step(status, step);
            at.map(|at| SystemTime::from(at.as_jiff()))
        };
        Ok(Self {
            outcome,
            ready: step(TimelineStep::Ready),
            finalised: step(last),
            opening: status.early_opening.clone(),
        })
    }
}

/// Returns the handover once it is over.
async fn handover_ends(bench: &Bench<'_>, followed: &Followed) -> Result<Handover> {
    let handovers: Api<Handover> = Api::namespaced(bench.cluster.client(), &followed.namespace);
    let over = |handover: Option<&Handover>| {
        let status = handover.and_then(|handover| handover.status.as_ref());
        status.is_some_and(|status| {
            status.phase.is_final() || status.phase == handover::Phase::Failed
        })
    };
    let handover = kube::runtime::wait::await_condition(handovers, &followed.name, over).await?;
    handover.with_context(|| format!("handover {}/{}", followed.namespace, followed.name))
}
