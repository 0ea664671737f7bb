//! How much is offered to a guest: what it carries at ease on this machine, found once for each lab.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use dataplane_probe::report as probe;
use dataplane_probe::run::Config;
use tokio::time::sleep;

use crate::cluster::Cluster;
use crate::lab::{Host, Lab, ProcessId, Progress, TAP_QUEUE};
use crate::report::{Baseline, NewConnections, Refused};
use crate::scenario::{Family, Peer};

use super::inside::{Measuring, REFLECTOR};
use super::validity;
use super::vm::{RunningVm, node_of};

/// Packets a second, each way and over all flows of a VM together: the most that is offered, and what is tried next.
const MOST: u32 = 1_000;
const LOWER: [u32; 3] = [500, 250, 100];
/// For how long each is tried.
const TRIED_FOR: Duration = Duration::from_secs(3);
/// What a guest does for the first time takes it longer: an emulated one has its code translated.
const WARM_UP: Duration = Duration::from_secs(1);
/// Most of its processors' time that may be used: the rest is for what a migration costs it.
const MOST_BUSY: f64 = 0.5;
/// A record of the long stream for so many packets, and a new connection.
const PACKETS_FOR_RECORD: u32 = 10;
const PACKETS_FOR_CONNECTION: u32 = 50;
/// However slow a flow is, its stream has to show a pause, and its connections what becomes of one.
const SLOWEST_STREAM: Duration = Duration::from_millis(50);
const SLOWEST_CONNECTIONS: Duration = Duration::from_millis(500);
/// Longer than anything: how late is too late depends on when it was, which [`validity`] judges.
const ANY_LATENESS: Duration = Duration::from_hours(1);

const _: () = assert!(
    validity::waiting(MOST, validity::LONG_PAUSE_MS) < TAP_QUEUE as u64,
    "what comes for a guest during a long pause has to find room in its tap"
);

/// What the probe offers to a flow of so many packets a second each way; streams and new connections are in proportion.
pub(super) fn config(target: SocketAddr, rate_hz: u32) -> Config {
    let every = |packets: u32, slowest: Duration| {
        let time = Duration::from_secs(packets.into()) / rate_hz.max(1);
        time.min(slowest)
    };
    Config {
        rate_hz,
        stream_every: Some(every(PACKETS_FOR_RECORD, SLOWEST_STREAM)),
        connect_every: Some(every(PACKETS_FOR_CONNECTION, SLOWEST_CONNECTIONS)),
        max_late: ANY_LATENESS,
        max_late_reflector: ANY_LATENESS,
        log: true,
        ..Config::new(target)
    }
}

/// The rates of flows that want so many packets a second each: all together at most `rate_hz`, but one at least.
pub(super) fn shares(wanted: &[u32], rate_hz: u32) -> Vec<u32> {
    let total: u64 = wanted.iter().copied().map(u64::from).sum();
    let share = |&wanted: &u32| {
        let share = u64::from(wanted) * u64::from(rate_hz) / total.max(1);
        u32::try_from(share)
            .unwrap_or(wanted)
            .clamp(1, wanted.max(1))
    };
    wanted.iter().map(share).collect()
}

/// Finds the rate that a VM which rests on its node carries at ease, with one flow from the client.
pub(super) async fn find(
    lab: &Lab,
    cluster: &Cluster,
    vm: &RunningVm,
    progress: &dyn Progress,
) -> Result<Baseline> {
    progress.step("Finding the rate that the guest carries at ease");
    let target = SocketAddr::new(vm.probed(Family::Ipv4)?, REFLECTOR);
    let client = lab.host(Peer::Client.host())?;
    let node = lab.host(&node_of(cluster.client(), &vm.spec).await?)?;
    let qemu = node.libvirt().qemu(&vm.domain)?;
    let qemu = qemu.with_context(|| format!("{} does not run", vm.domain))?;
    let warming = Measuring::start(client, config(target, MOST)).await?;
    sleep(WARM_UP).await;
    warming.finish().await?;
    let mut refused = Vec::new();
    let mut tried = try_rate(client, target, qemu, MOST).await?;
    for next in LOWER {
        if tried.not_at_ease.is_empty() {
            break;
        }
        refused.push(Refused {
            rate_hz: tried.rate_hz,
            why: tried.not_at_ease,
        });
        tried = try_rate(client, target, qemu, next).await?;
    }
    progress.step(&format!(
        "Measuring with {} packets a second each way, which keep the guest busy for {:.0} % of the time",
        tried.rate_hz,
        tried.guest_busy * 100.0
    ));
    Ok(Baseline { refused, ..tried })
}

async fn try_rate(
    client: &Host,
    target: SocketAddr,
    qemu: ProcessId,
    rate_hz: u32,
) -> Result<Baseline> {
    let measuring = Measuring::start(client, config(target, rate_hz)).await?;
    let (begun, before) = (Instant::now(), qemu.processor_time(is_vcpu)?);
    sleep(TRIED_FOR).await;
    let used = qemu.processor_time(is_vcpu)?.saturating_sub(before);
    let guest_busy = used.as_secs_f64() / begun.elapsed().as_secs_f64();
    let outcome = measuring.finish().await?;
    let late = validity::reasons(&outcome.report, outcome.packets.as_ref(), None);
    let not_at_ease = not_at_ease(&outcome.report, late, guest_busy);
    tracing::info!(rate_hz, guest_busy, ?not_at_ease, "tried a rate");
    let tcp = outcome.report.tcp.as_ref();
    Ok(Baseline {
        rate_hz,
        guest_busy,
        to_vm_gap_ms: outcome.report.to_vm.service_gap_ms,
        from_vm_gap_ms: outcome.report.from_vm.service_gap_ms,
        longest_tcp_stall_ms: tcp.map_or(0.0, |tcp| tcp.longest_stall_ms),
        new_connections: NewConnections::of(&outcome.report),
        not_at_ease,
        refused: Vec::new(),
    })
}

/// Whether a thread of QEMU's is a guest's processor, by its name: `CPU 0/TCG`, `CPU 0/KVM`.
fn is_vcpu(name: &str) -> bool {
    name.starts_with("CPU ")
}

/// Why a guest that was busy for this share of the time did not carry at ease what it was offered.
fn not_at_ease(measured: &probe::Report, mut why: Vec<String>, guest_busy: f64) -> Vec<String> {
    for (way, direction) in [("towards", &measured.to_vm), ("from", &measured.from_vm)] {
        if direction.lost > 0 {
            why.push(format!("{} packets {way} the VM were lost", direction.lost));
        }
    }
    if guest_busy > MOST_BUSY {
        why.push(format!(
            "the guest's processor was busy for {:.0} % of the time, and half of it has to be free",
            guest_busy * 100.0
        ));
    }
    why
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::samples::measured;

    #[test]
    fn flows_share_the_rate_and_none_gets_more_than_it_wants() {
        assert_eq!(shares(&[1_000], 1_000), [1_000]);
        assert_eq!(shares(&[300, 100], 1_000), [300, 100]);
        assert_eq!(shares(&[1_000, 100, 100], 600), [500, 50, 50]);
        assert_eq!(shares(&[1_000, 1], 100), [99, 1]);
        for rate_hz in LOWER {
            let all = shares(&[1_000, 100, 100, 100], rate_hz);
            assert!(all.iter().sum::<u32>() <= rate_hz, "{all:?}");
        }
    }

    #[test]
    fn streams_and_connections_follow_the_packets() {
        let every = |rate_hz| {
            let config = config(([192, 0, 2, 1], 7_000).into(), rate_hz);
            let millis = |every: Option<Duration>| every.unwrap().as_millis();
            (millis(config.stream_every), millis(config.connect_every))
        };
        assert_eq!(every(1_000), (10, 50));
        assert_eq!(every(250), (40, 200));
        assert_eq!(every(20), (50, 500));
    }

    #[test]
    fn at_ease_is_without_loss_on_time_and_half_idle() {
        let on_time = || Vec::new();
        assert_eq!(not_at_ease(&measured(), on_time(), 0.5), on_time());
        assert_eq!(not_at_ease(&measured(), on_time(), 0.51).len(), 1);
        assert_eq!(
            not_at_ease(&measured(), vec!["late".to_owned()], 0.1).len(),
            1
        );
        let mut losing = measured();
        losing.from_vm.lost = 1;
        assert_eq!(not_at_ease(&losing, on_time(), 0.1).len(), 1);
    }

    #[test]
    fn a_guests_processors_are_told_by_their_names() {
        assert!(is_vcpu("CPU 0/TCG") && is_vcpu("CPU 1/KVM"));
        assert!(!is_vcpu("qemu-system-x86") && !is_vcpu("IO mon_iothread"));
    }
}
