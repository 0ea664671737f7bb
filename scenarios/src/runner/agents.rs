//! What is done to agents in a migration, and what they count.

use std::sync::Arc;
use std::time::SystemTime;

use anyhow::{Context as _, Result};
use tokio::sync::Mutex;
use tokio::task::JoinSet;

use crate::cluster::{Agents, Hook};
use crate::report::{Check, EarlyOpening, Migration};
use crate::scenario::{self, AgentFault, AgentFaultKind, FailureStrategy, Forgeries, OnTimeout};
use crate::scenario::{Migrate, Moment, OpenedBy, Strategy};

use super::Bench;
use super::checks::Checks;
use super::moments::Moments;

/// What an agent has counted of false announcements.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counted(Forgeries);

/// The gate that a scenario asks for.
pub(super) fn hook(wanted: scenario::Hook) -> Hook {
    let seconds = wanted.deadline_seconds.map(u64::from);
    Hook {
        deadline: seconds.map(std::time::Duration::from_secs),
        fails_on_timeout: wanted.on_timeout == OnTimeout::Fail,
        refusal_counts: wanted.failure_strategy == FailureStrategy::Fail,
    }
}

/// Before a migration: returns once all agents run and have a controller, but those that are to be absent.
pub(super) async fn prepare(bench: &Bench<'_>, migrate: &Migrate) -> Result<()> {
    if bench.strategy != Strategy::Segue {
        return Ok(());
    }
    let mut agents = bench.cluster.agents()?.lock().await;
    agents.settled().await?;
    for fault in &migrate.agents {
        if fault.what == AgentFaultKind::Absent {
            agents.stop(&fault.node).await?;
        }
    }
    Ok(())
}

/// Sets off what is to happen to agents, each thing at its moment.
pub(super) fn disturb(
    bench: &Bench<'_>,
    migrate: &Migrate,
    moments: &Moments,
    disturbances: &mut JoinSet<Result<Vec<Check>>>,
) -> Result<()> {
    for fault in &migrate.agents {
        let agents = Arc::clone(bench.cluster.agents()?);
        let (fault, moments) = (fault.clone(), moments.clone());
        disturbances.spawn(async move {
            let done = suffer(&agents, &fault, &moments).await;
            done.with_context(|| format!("{:?} the agent of {}", fault.what, fault.node))
        });
    }
    Ok(())
}

/// Returns whether it was done where it should be.
async fn suffer(
    agents: &Mutex<Agents>,
    fault: &AgentFault,
    moments: &Moments,
) -> Result<Vec<Check>> {
    let node = fault.node.as_str();
    if let Some(at) = fault.at {
        moments.wait(at).await;
    }
    match fault.what {
        AgentFaultKind::Kill => agents.lock().await.crash(node).await?,
        AgentFaultKind::Freeze => agents.lock().await.freeze(node)?,
        AgentFaultKind::Cut => agents.lock().await.cut(node).await?,
        // Since before the migration.
        AgentFaultKind::Absent => {}
    }
    let done = SystemTime::now();
    moments.wait(fault.again_at).await;
    {
        let mut agents = agents.lock().await;
        match fault.what {
            AgentFaultKind::Kill | AgentFaultKind::Absent => agents.start(node).await?,
            AgentFaultKind::Freeze => agents.thaw(node)?,
            AgentFaultKind::Cut => agents.mend(node).await?,
        }
    }
    Ok(in_time(fault, done, moments.at(Moment::Paused)))
}

/// What is to be done before the guest pauses was done by then: later it shows nothing.
fn in_time(fault: &AgentFault, done: SystemTime, paused: Option<SystemTime>) -> Vec<Check> {
    let mut checks = Checks::default();
    if fault.at.is_some_and(|at| at < Moment::Paused) {
        let (what, node) = (fault.what, &fault.node);
        checks.that(
            format!("{what:?} of the agent of {node} comes before the pause"),
            paused.is_none_or(|paused| done < paused),
            || format!("done at {done:?}, paused at {paused:?}"),
        );
    }
    checks.0
}

// === impl Counted ===

impl Counted {
    /// What the agent of a node has counted by now. The caller is in central's network namespace.
    pub(super) async fn of(bench: &Bench<'_>, node: &str) -> Result<Self> {
        let agents = bench.cluster.agents()?.lock().await;
        Ok(Self::read(&agents.metrics(node).await?))
    }

    fn read(metrics: &str) -> Self {
        let count = |reason: &str| {
            let name = format!("segue_agent_forgeries_total{{reason=\"{reason}\"}}");
            total(metrics, &name)
        };
        Self(Forgeries {
            on_source: count("on_source"),
            anothers_address: count("anothers_address"),
        })
    }

    /// What has come since.
    pub(super) fn since(self, before: Self) -> Forgeries {
        let (Self(now), Self(before)) = (self, before);
        Forgeries {
            on_source: now.on_source.saturating_sub(before.on_source),
            anothers_address: now.anothers_address.saturating_sub(before.anothers_address),
        }
    }
}

/// What the scenario expects of agents and of the gate.
pub(super) fn check(migration: &Migration, migrate: &Migrate) -> Vec<Check> {
    let mut checks = Checks::default();
    let (vm, expect, timeline) = (&migration.vm, &migrate.expect, &migration.timeline_us);
    let opening = migration.early_opening.as_ref();
    // One that stood still meanwhile does later what it was told, and opens nothing by it.
    let in_time = timeline.opened.zip(timeline.resumed);
    let in_time = in_time.is_some_and(|(opened, resumed)| opened < resumed);
    let by_agent = opening.is_some_and(EarlyOpening::is_opened) && in_time;
    let found = || format!("{opening:?}, {timeline:?}");
    match expect.opened_by {
        Some(OpenedBy::Agent) => {
            checks.that(
                format!("the target's agent opens the port of {vm} during the pause"),
                by_agent && timeline.activated.is_some(),
                found,
            );
        }
        Some(OpenedBy::Announcement) => {
            let what = format!("the port of {vm} opens when the guest announces itself");
            checks.that(what, !by_agent && timeline.activated.is_some(), found);
        }
        None => {}
    }
    if let Some(after) = expect.copy_after_ready {
        let ready_first = timeline.copying.zip(timeline.ready);
        let ready_first = ready_first.is_some_and(|(copying, ready)| ready <= copying);
        let what = if after {
            format!("{vm} is copied when its handover is ready")
        } else {
            format!("{vm} is copied although its handover is not ready")
        };
        checks.that(
            what,
            ready_first == after && timeline.copying.is_some(),
            found,
        );
    }
    if let Some(least) = expect.held_at_least_ms {
        let held = migration.gate_held_ms;
        checks.that(
            format!("the gate holds {vm} for {least} ms at least"),
            held.is_some_and(|held| held >= least),
            || format!("{held:?}"),
        );
    }
    checks.0
}

/// What was announced falsely was counted, and nothing came of it.
pub(super) fn check_forgeries(
    migration: &Migration,
    migrate: &Migrate,
    counted: Forgeries,
) -> Vec<Check> {
    let mut checks = Checks::default();
    let (vm, due) = (&migration.vm, migrate.expect.forgeries.unwrap_or_default());
    checks.that(
        format!("the agent counts what {vm} announces falsely: {due:?}, or more"),
        counted.on_source >= due.on_source && counted.anothers_address >= due.anothers_address,
        || format!("{counted:?}"),
    );
    let activated = migration.timeline_us.activated;
    checks.that(
        format!("the port of {vm} stays shut on the target until it pauses"),
        activated.is_none_or(|activated| activated >= 0),
        || format!("opened {activated:?} µs after the pause"),
    );
    checks.0
}

/// All samples together whose names, labels included, begin so.
pub(super) fn total(metrics: &str, prefix: &str) -> u64 {
    let samples = metrics.lines().filter(|line| line.starts_with(prefix));
    samples
        .filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok())
        .sum()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn what_comes_after_the_pause_missed_it() {
        let held = |at, done: u64, paused: Option<u64>| {
            let fault = AgentFault {
                node: "node1".to_owned(),
                what: AgentFaultKind::Cut,
                at,
                again_at: Moment::Ended,
            };
            let time = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
            let checks = in_time(&fault, time(done), paused.map(time));
            checks.first().map(Check::held)
        };
        let copying = Some(Moment::Copying);
        assert_eq!(held(copying, 5, Some(6)), Some(true));
        assert_eq!(held(copying, 6, Some(6)), Some(false));
        assert_eq!(held(copying, 6, None), Some(true));
        // It is to come after, or there is nothing to miss.
        assert_eq!(held(Some(Moment::Paused), 7, Some(6)), None);
        assert_eq!(held(None, 7, Some(6)), None);
    }

    #[test]
    fn counters_are_summed_over_their_labels() {
        let metrics = "\
# TYPE segue_agent_forgeries counter
segue_agent_forgeries_total{reason=\"nothing_moves\"} 7
segue_agent_forgeries_total{reason=\"on_source\"} 3
segue_agent_forgeries_total{reason=\"anothers_address\"} 1
segue_agent_armed 2
";
        assert_eq!(total(metrics, "segue_agent_forgeries_total{"), 11);
        let counted = Counted::read(metrics);
        let new = counted.since(Counted(Forgeries {
            on_source: 1,
            anothers_address: 0,
        }));
        assert_eq!((new.on_source, new.anothers_address), (2, 1));
    }
}
