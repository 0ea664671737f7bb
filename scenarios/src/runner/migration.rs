//! One migration: set off, disturbed, followed, measured, checked.

use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, bail};
use dataplane_probe::packets::PacketLog;
use dataplane_probe::report as probe;
use k8s_openapi::api::core::v1::Event;
use kube::Api;
use kube::api::{DeleteParams, ListParams, PostParams};
use nix::sys::signal::Signal;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::cluster;
use crate::kubevirt::VirtualMachineInstanceMigration;
use crate::lab::Daemon;
use crate::lab::libvirt::{Fault, MigrateOptions};
use crate::report::{
    self, Check, EarlyOpening, Interruption, Pause, Places, Timeline, network_added_ms,
};
use crate::scenario::{Failure, Migrate, Moment, Outcome, PortsOf};

use super::Bench;
use super::agents::{self, Counted};
use super::checks::{self, Checks};
use super::conduct::{Conduct, Ending};
use super::feeders::{self, Followed};
use super::flows::{Flows, Known, Watched};
use super::forging;
use super::inside::{self, Awake, FirstFrame};
use super::killing::Killing;
use super::kube_ovn;
use super::late::late;
use super::moments::Moments;
use super::place;
use super::pods;
use super::shown;
use super::taps;
use super::vm::{RunningVm, node_of};

/// What is measured before the migration begins and after it has ended, so that its beginning and
/// end lie within.
const MARGIN: Duration = Duration::from_secs(1);
/// Emulated guests on a busy machine; a migration usually takes a few seconds.
const DEADLINE: Duration = Duration::from_mins(2);
/// Slow enough that a small guest is still being copied when a cancellation arrives.
const STRETCHED_MIB: u32 = 8;
/// Slow enough that whatever is started when the copy begins has ended before the guest pauses, which is after some
/// 0.4 seconds otherwise.
const UNHURRIED_MIB: u32 = 32;

/// What came of a migration.
pub(super) struct Done {
    /// Name of the migration object.
    pub name: String,
    pub migration: report::Migration,
    pub checks: Vec<Check>,
    /// When the guest paused, in nanoseconds of Unix time.
    pub paused_ns: Option<u64>,
    /// Every packet of the primary flow, unless the reflector could not be asked.
    pub packets: Option<PacketLog>,
}

/// Runs one migration of a scenario.
pub(super) async fn run(bench: &Bench<'_>, vm: &RunningVm, migrate: &Migrate) -> Result<Done> {
    let client = bench.cluster.client();
    let followed = Followed {
        namespace: vm.spec.namespace.clone(),
        name: bench.next_name(&vm.spec.name),
        domain: vm.domain.clone(),
        source: node_of(client.clone(), &vm.spec).await?,
        target: migrate.to.clone(),
        ports: vm.ports().map(str::to_owned).collect(),
        placed: vm.placed(),
    };
    agents::prepare(bench, migrate).await?;
    let forgeries = match migrate.expect.forgeries {
        Some(_) => Some(Counted::of(bench, &followed.source).await?),
        None => None,
    };
    bench.cluster.hypervisor.plan(&vm.domain, options(migrate));
    let killing = Killing::prepare(bench, migrate).await?;
    let moments = Moments::new();
    let events = bench.cluster.hypervisor.raw_events();
    let calls = bench.cluster.hook_calls();
    let mut feeders = feeders::start(&followed, &moments, &client, bench.ovn, events, calls);
    let conduct = Conduct::prepare(bench, vm, &followed, &moments).await?;

    let groups = pods::groups(bench.ovn, vm);
    let gateway = place::gateway(bench, vm, &followed.source).await?;
    let nodes = [followed.source.as_str(), followed.target.as_str()];
    let capture = match &bench.captures {
        Some(captures) => Some(captures.begin(bench, vm, nodes).await?),
        None => None,
    };
    let flows = Flows::start(bench, vm, &nodes).await?;
    sleep(MARGIN).await;
    let mut disturbances = disturb(bench, &followed, migrate, killing, &moments);
    agents::disturb(bench, migrate, &moments, &mut disturbances)?;
    kube_ovn::disturb(bench, &followed, migrate, &moments, &mut disturbances);
    disturbances.spawn(deceive(bench, vm, &followed, migrate, moments.clone())?);
    create(bench, &followed).await?;
    let ended = async {
        let (first_frame, dropped, ending) = tokio::try_join!(
            watch_target(bench, vm, &followed, &moments),
            taps::dropped(bench, vm, &followed, &moments),
            conduct.until_over(bench, &followed, &moments),
        )?;
        let mut disturbed = Vec::new();
        while let Some(done) = disturbances.join_next().await {
            disturbed.extend(done.context("a disturbance")??);
        }
        anyhow::Ok((first_frame, dropped, ending, disturbed))
    };
    let (first_frame, dropped, ending, disturbed) = tokio::select! {
        ended = timeout(DEADLINE, ended) => match ended {
            Ok(ended) => ended?,
            Err(_) => return Err(late(bench, &followed, &moments, DEADLINE.as_secs()).await),
        },
        Some(failed) = feeders.join_next() => {
            failed.context("a feeder")??;
            bail!("a feeder ended before migration {} did", followed.name);
        }
    };
    sleep(MARGIN).await;
    let mut watched = flows.finish(vm).await?;
    let captured = match capture {
        Some(capture) => Some(capture.finish().await?),
        None => None,
    };

    let resumed = moments.at(Moment::Resumed);
    let (awake, missed) = match (first_frame, resumed) {
        (Some(watch), Some(resumed)) => watch.after(resumed).await,
        _ => (Awake::default(), None),
    };
    let mut migration = assemble(vm, &followed, &moments, &ending, (awake, dropped), &watched)?;
    bench.strategy.as_str().clone_into(&mut migration.strategy);
    migration.invalid.extend(missed);
    let now = place::gateway(bench, vm, place_after(&followed, migration.outcome)).await?;
    migration.gateway = place::compared(&gateway, &now);
    let mut checks = check(bench, vm, &followed, migrate, &migration).await?;
    let place = place_after(&followed, migration.outcome);
    checks.extend(pods::check(bench.ovn, vm, place, &groups));
    checks.extend(disturbed);
    checks.extend(agents::check(&migration, migrate));
    if let Some(before) = forgeries {
        let new = Counted::of(bench, &followed.source).await?.since(before);
        checks.extend(agents::check_forgeries(&migration, migrate, new));
    }
    if migrate.expect.shown_by_kubectl {
        checks.extend(shown::check(bench, &followed, &migration).await?);
    }
    checks.extend(check_flows(vm, migrate, &migration, &watched, bench)?);
    if let Some(captured) = captured {
        checks.extend(captured.check(&migration));
    }
    Ok(Done {
        name: followed.name,
        migration,
        checks,
        paused_ns: moments.at(Moment::Paused).and_then(unix_nanos),
        packets: watched.take_packets(),
    })
}

fn options(migrate: &Migrate) -> MigrateOptions {
    MigrateOptions {
        bandwidth_mib: bandwidth_mib(migrate),
        fault: migrate.fail.map(|failure| match failure {
            Failure::SwitchOver => Fault::TargetDiesAtSwitchover,
        }),
    }
}

/// What is to happen while the guest is copied needs a copy that lasts.
fn bandwidth_mib(migrate: &Migrate) -> Option<u32> {
    let mut faults = migrate.agents.iter();
    if migrate.cancel_at.is_some() {
        Some(STRETCHED_MIB)
    } else if faults.any(|fault| fault.at == Some(Moment::Copying)) {
        Some(UNHURRIED_MIB)
    } else {
        None
    }
}

async fn create(bench: &Bench<'_>, followed: &Followed) -> Result<()> {
    let migrations: Api<VirtualMachineInstanceMigration> =
        Api::namespaced(bench.cluster.client(), &followed.namespace);
    let vm = followed.domain.split_once('_').map_or("", |(_, name)| name);
    let object = cluster::vmim(&followed.namespace, &followed.name, vm, &followed.target);
    migrations
        .create(&PostParams::default(), &object)
        .await
        .with_context(|| format!("create migration {}/{}", followed.namespace, followed.name))?;
    Ok(())
}

/// Sets off what is to go wrong, each thing at its moment.
fn disturb(
    bench: &Bench<'_>,
    followed: &Followed,
    migrate: &Migrate,
    killing: Option<Killing>,
    moments: &Moments,
) -> JoinSet<Result<Vec<Check>>> {
    let mut disturbances = JoinSet::new();
    if let Some(killing) = killing {
        disturbances.spawn(killing.run(followed.clone(), moments.clone()));
    }
    if let Some(at) = migrate.cancel_at {
        disturbances.spawn(cancel(bench, followed, at, moments.clone()));
    }
    disturbances
}

/// Deletes the migration object at its moment.
fn cancel(
    bench: &Bench<'_>,
    followed: &Followed,
    at: Moment,
    moments: Moments,
) -> impl Future<Output = Result<Vec<Check>>> + use<> {
    let migrations: Api<VirtualMachineInstanceMigration> =
        Api::namespaced(bench.cluster.client(), &followed.namespace);
    let name = followed.name.clone();
    async move {
        moments.wait(at).await;
        migrations
            .delete(&name, &DeleteParams::default())
            .await
            .with_context(|| format!("cancel migration {name}"))?;
        Ok(Vec::new())
    }
}

/// Lets the target's ovn-controller stand still, and the guest announce what is not so, where that is asked for.
fn deceive(
    bench: &Bench<'_>,
    vm: &RunningVm,
    followed: &Followed,
    migrate: &Migrate,
    moments: Moments,
) -> Result<impl Future<Output = Result<Vec<Check>>> + use<>> {
    let source = bench.lab.host(&followed.source)?.clone();
    let target = bench.lab.host(&followed.target)?.clone();
    let guest = bench.cluster.hypervisor.guest(&vm.domain);
    let guest = guest.context("a VM without a guest")?;
    let nic = vm.nics.first().context("a VM without ports")?.clone();
    let (stalls, forge_at) = (migrate.target_stalls_ms, migrate.forge_at);
    Ok(async move {
        let stalling = async {
            let Some(time) = stalls else { return Ok(()) };
            moments.wait(Moment::Scheduled).await;
            target.signal(Daemon::OvnController, Signal::SIGSTOP)?;
            sleep(Duration::from_millis(time.into())).await;
            target.signal(Daemon::OvnController, Signal::SIGCONT)
        };
        let forging = async {
            let Some(at) = forge_at else { return Ok(()) };
            moments.wait(at).await;
            forging::forge(&guest, &source, &nic).await
        };
        tokio::try_join!(stalling, forging)?;
        Ok(Vec::new())
    })
}

/// Watches the target's tap from when it is there; nothing to watch where the migration ends before.
async fn watch_target(
    bench: &Bench<'_>,
    vm: &RunningVm,
    followed: &Followed,
    moments: &Moments,
) -> Result<Option<FirstFrame>> {
    tokio::select! {
        // The target's libvirt has taken the tap over by the time anything is copied.
        () = moments.wait(Moment::Copying) => {}
        () = moments.wait(Moment::Ended) => return Ok(None),
    }
    let nic = vm.nics.first().context("a VM without ports")?;
    let watch = FirstFrame::watch(bench.lab.host(&followed.target)?, nic.tap(), nic.mac).await?;
    Ok(Some(watch))
}

fn assemble(
    vm: &RunningVm,
    followed: &Followed,
    moments: &Moments,
    ending: &Ending,
    (awake, dropped_by_taps): (Awake, u64),
    watched: &Watched,
) -> Result<report::Migration> {
    let measured = watched.primary()?;
    let first_frame = awake.frame;
    let (paused, resumed) = (moments.at(Moment::Paused), moments.at(Moment::Resumed));
    let from_pause = |at: Option<SystemTime>| micros_between(paused?, at?);
    let pause_ms = from_pause(resumed).map(millis);
    let guest_wake_ms = match (resumed, first_frame) {
        (Some(resumed), Some(first)) => micros_between(resumed, first).map(millis),
        _ => None,
    };
    let interruption = || {
        Some(Interruption {
            paused_ns: unix_nanos(paused?)?,
            resumed_ns: unix_nanos(resumed?)?,
            first_frame_ns: unix_nanos(first_frame?)?,
            first_packet_ns: awake.packet.and_then(unix_nanos),
        })
    };
    let added = interruption().and_then(|interruption| {
        network_added_ms(&measured.to_vm, &measured.from_vm, interruption)
    });
    let activated = moments.at(Moment::Activated);
    let opening = ending.opening.as_ref().map(|recorded| {
        EarlyOpening::of(
            recorded,
            paused.and_then(unix_micros),
            activated.and_then(unix_micros),
        )
    });
    let known = known(moments, opening.as_ref(), first_frame, dropped_by_taps);
    let flows = watched.flows(known);
    let primary = flows.first().context("no flow was measured")?.clone();
    let copying = moments.at(Moment::Copying);
    let gate_held = moments.at(Moment::Asked).zip(copying);
    let gate_held = gate_held.and_then(|(asked, copying)| micros_between(asked, copying));
    Ok(report::Migration {
        vm: vm.spec.key(),
        source: followed.source.clone(),
        target: followed.target.clone(),
        topology: vm.layout.topology,
        strategy: String::new(),
        outcome: ending.outcome,
        timeline_us: Timeline {
            armed: from_pause(moments.at(Moment::Armed)),
            ready: from_pause(ending.ready.or(moments.at(Moment::Ready))),
            copying: from_pause(copying),
            paused: from_pause(paused),
            opened: opening.as_ref().and_then(|opening| opening.opened),
            activated: from_pause(activated),
            resumed: from_pause(resumed),
            guest_first_frame: from_pause(first_frame),
            flipped: from_pause(moments.at(Moment::Flipped)),
            finalised: from_pause(ending.finalised),
        },
        pause_ms,
        guest_wake_ms,
        silent_before_pause_ms: silent_before(&measured.from_vm, paused.and_then(unix_nanos)),
        network_added_ms: added.map(|(added, _)| added),
        network_added_error_ms: added.map(|(_, error)| error),
        early_opening: opening,
        gate_held_ms: gate_held.map(millis),
        to_vm: primary.to_vm,
        from_vm: primary.from_vm,
        tcp: primary.tcp,
        new_connections: primary.new_connections,
        forbidden: watched.forbidden(),
        gateway: Vec::new(),
        invalid: watched.invalid(&flows, known.pause),
        flows,
    })
}

/// What the figures of flows are read with.
fn known(
    moments: &Moments,
    opening: Option<&EarlyOpening>,
    first_frame: Option<SystemTime>,
    dropped_by_taps: u64,
) -> Known {
    let (paused, resumed) = (moments.at(Moment::Paused), moments.at(Moment::Resumed));
    let paused_ns = paused.and_then(unix_nanos);
    Known {
        pause: paused_ns.map(|paused_ns| Pause {
            paused_ns,
            awake_ns: first_frame.or(resumed).and_then(unix_nanos),
        }),
        resumed,
        places: Places {
            paused_ns,
            open_ns: opened_at(paused, opening, moments).and_then(unix_nanos),
            dropped_by_taps,
        },
    }
}

/// When the target's port was open: by its agent's doing, or by OVN's; where there is nothing to open, when what leads to
/// the guest was changed.
fn opened_at(
    paused: Option<SystemTime>,
    opening: Option<&EarlyOpening>,
    moments: &Moments,
) -> Option<SystemTime> {
    let opened = opening.filter(|opening| opening.is_opened());
    let after = opened.and_then(|opening| u64::try_from(opening.open?).ok());
    let by_agent = paused
        .zip(after)
        .map(|(paused, micros)| paused + Duration::from_micros(micros));
    by_agent
        .or(moments.at(Moment::Activated))
        .or(moments.at(Moment::Flipped))
}

/// How long nothing had come from the guest when it paused, in milliseconds.
fn silent_before(from_vm: &probe::Direction, paused_ns: Option<u64>) -> Option<f64> {
    let paused_ns = paused_ns?;
    let spans = |gap: &&probe::Gap| (gap.start_ns..=gap.end_ns).contains(&paused_ns);
    let gap = from_vm.gaps.iter().find(spans)?;
    let micros = i64::try_from((paused_ns - gap.start_ns) / 1_000).ok()?;
    Some(millis(micros))
}

async fn check(
    bench: &Bench<'_>,
    vm: &RunningVm,
    followed: &Followed,
    migrate: &Migrate,
    migration: &report::Migration,
) -> Result<Vec<Check>> {
    let mut checks = Checks::default();
    checks::expectations(&mut checks, migration, &migrate.expect);
    // What others write on their own signs is measured as it is.
    if bench.strategy.is_segue() {
        let killed = migrate.kill_controller.is_some();
        checks::on_the_way(&mut checks, migration, &migrate.expect, killed);
    }
    let place = place_after(followed, migration.outcome);
    let guest = bench
        .cluster
        .hypervisor
        .guest(&vm.domain)
        .context("a VM without a guest")?;
    let runs = guest.runs_on(bench.lab.host(place)?).await?;
    checks.that(format!("{} runs on {place}", migration.vm), runs, || {
        "it does not".to_owned()
    });
    for (name, before) in &vm.before {
        let now = bench.ovn.port(name);
        checks::port(
            &mut checks,
            name,
            now.as_ref(),
            before,
            place,
            vm.layout.cni,
        );
    }
    // Who moves no place sets does not have them wrong.
    if bench.strategy.is_segue() || vm.layout.ports_of == PortsOf::Pod {
        place::check(&mut checks, bench.ovn, vm, place);
    }
    place::check_gateway(&mut checks, vm, &migration.gateway);
    if migrate.fail == Some(Failure::SwitchOver) {
        checks.that(
            format!("{} had paused before it failed to move", migration.vm),
            migration.timeline_us.paused.is_some(),
            || "it failed before the switch-over".to_owned(),
        );
    }
    if migrate.cancel_at.is_some() {
        checks.that(
            format!("{} never paused", migration.vm),
            migration.timeline_us.paused.is_none(),
            || "it was cancelled too late".to_owned(),
        );
    }
    if bench.strategy.is_segue() {
        let told = events_of(bench, followed).await?;
        checks.that(
            format!("Events on migration {} tell of the handover", followed.name),
            told > 0,
            || "there are none".to_owned(),
        );
    }
    let client = bench.lab.host("client")?;
    for address in vm.addresses() {
        let answer = inside::answers(client, address).await;
        checks.that(
            format!("{} answers at {address}", migration.vm),
            answer.is_ok(),
            || {
                answer
                    .err()
                    .map_or_else(String::new, |error| format!("{error:#}"))
            },
        );
    }
    Ok(checks.0)
}

/// Where the guest is once it is over.
fn place_after(followed: &Followed, outcome: Outcome) -> &str {
    match outcome {
        Outcome::Succeeded => &followed.target,
        Outcome::RolledBack | Outcome::Failed => &followed.source,
    }
}

/// What is expected of the flows but the primary one.
fn check_flows(
    vm: &RunningVm,
    migrate: &Migrate,
    migration: &report::Migration,
    watched: &Watched,
    bench: &Bench<'_>,
) -> Result<Vec<Check>> {
    let mut checks = Checks::default();
    let expected = watched.expected(&migrate.expect.flows);
    checks::flows(&mut checks, &migration.vm, &migration.flows, &expected);
    for (flow, expect) in migration.flows.iter().zip(&expected) {
        if let Some(nodes) = &expect.heard_from {
            let translated = bench.gateways(nodes, flow.family)?;
            let own = vm.probed(flow.family)?;
            checks::heard_from(&mut checks, flow, &translated, own);
        }
    }
    checks::forbidden(&mut checks, &migration.vm, &migration.forbidden);
    Ok(checks.0)
}

/// How many Events of segue's a migration bears.
async fn events_of(bench: &Bench<'_>, followed: &Followed) -> Result<usize> {
    let events: Api<Event> = Api::namespaced(bench.cluster.client(), &followed.namespace);
    let about = ListParams::default().fields(&format!(
        "involvedObject.kind=VirtualMachineInstanceMigration,involvedObject.name={}",
        followed.name
    ));
    let events = events.list(&about).await.context("list Events")?;
    let ours = |event: &Event| {
        let reason = event.reason.as_deref();
        reason.is_some_and(|reason| reason.starts_with("Network"))
    };
    Ok(events.items.iter().filter(|event| ours(event)).count())
}

fn unix_nanos(at: SystemTime) -> Option<u64> {
    let since = at.duration_since(SystemTime::UNIX_EPOCH).ok()?;
    u64::try_from(since.as_nanos()).ok()
}

fn unix_micros(at: SystemTime) -> Option<i64> {
    micros_between(SystemTime::UNIX_EPOCH, at)
}

fn micros_between(from: SystemTime, to: SystemTime) -> Option<i64> {
    match to.duration_since(from) {
        Ok(after) => i64::try_from(after.as_micros()).ok(),
        Err(before) => i64::try_from(before.duration().as_micros())
            .ok()
            .map(|micros| -micros),
    }
}

#[allow(
    clippy::cast_precision_loss,
    reason = "microseconds of a migration are far below 2^52"
)]
pub(super) fn millis(micros: i64) -> f64 {
    micros as f64 / 1_000.0
}
