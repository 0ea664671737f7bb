//! A guest that announces what is not so.

use anyhow::{Context as _, Result};

use crate::lab::{Guest, Host, Nic};
use crate::report::Check;

use super::Bench;
use super::agents::total;
use super::checks::Checks;
use super::inside;
use super::vm::{RunningVm, node_of};

/// An Ethernet address that no machine of the lab has.
const NOBODYS: &str = "0a:58:de:ad:be:ef";
/// A guest's first interface, as its kernel names it.
const INTERFACE: &str = "eth0";
/// What would have come of an announcement that was believed.
const CONSEQUENCES: [&str; 2] = ["segue_agent_signals_total{", "segue_agent_commands_total{"];

/// Has a guest announce, where it runs, that it has come there, and then the same of a machine that there is not.
///
/// A RARP is what QEMU sends on the guest's behalf; it is asked for the same again. A gratuitous ARP is the guest's own.
pub(super) async fn forge(guest: &Guest, node: &Host, nic: &Nic) -> Result<()> {
    let announce =
        r#"{"execute":"announce-self","arguments":{"initial":50,"max":50,"rounds":1,"step":0}}"#;
    node.libvirt()
        .virsh(["qemu-monitor-command", guest.name(), announce])
        .await
        .context("QEMU's announcement")?;
    let (address, _) = nic.v4.context("a guest without an IPv4 address")?;
    let own = &nic.mac;
    let arping = format!("arping -q -U -c 1 -I {INTERFACE} {address}");
    // One line: for as long as it takes the guest has no network.
    let command = format!(
        "{arping}; ip link set {INTERFACE} address {NOBODYS}; {arping}; ip link set {INTERFACE} address {own}; {arping}; \
         ip link show {INTERFACE}"
    );
    let shown = guest.run(node, &command).await?;
    anyhow::ensure!(
        shown.contains(&own.to_string()),
        "{} has another address than before: {shown}",
        guest.name()
    );
    Ok(())
}

/// A VM that does not move announces that it does.
pub(super) async fn at_rest(bench: &Bench<'_>, vm: &RunningVm) -> Result<Vec<Check>> {
    let node = node_of(bench.cluster.client(), &vm.spec).await?;
    let guest = bench.cluster.hypervisor.guest(&vm.domain);
    let guest = guest.context("a VM without a guest")?;
    let nic = vm.nics.first().context("a VM without ports")?;
    let ports = || -> Vec<_> { vm.ports().map(|port| bench.ovn.port(port)).collect() };
    let (before, did_before) = (ports(), consequences(bench).await?);
    forge(&guest, bench.lab.host(&node)?, nic).await?;

    let mut checks = Checks::default();
    let client = bench.lab.host("client")?;
    for address in vm.addresses() {
        let answers = inside::answers(client, address).await;
        checks.worked(format!("{} answers at {address}", vm.spec.key()), &answers);
    }
    let (after, did_after) = (ports(), consequences(bench).await?);
    checks.that(
        format!(
            "nothing changes at the ports of {}, which announced itself",
            vm.spec.key()
        ),
        before == after,
        || format!("{after:?}, they were {before:?}"),
    );
    checks.that(
        "no agent takes it for a sign or does anything",
        did_before == did_after,
        || format!("{did_after:?}, it was {did_before:?}"),
    );
    Ok(checks.0)
}

/// What all agents have told and done by now.
async fn consequences(bench: &Bench<'_>) -> Result<Vec<u64>> {
    let agents = bench.cluster.agents()?.lock().await;
    let mut counted = Vec::new();
    for node in bench.lab.nodes() {
        let metrics = agents.metrics(node.name()).await?;
        counted.extend(CONSEQUENCES.map(|name| total(&metrics, name)));
    }
    Ok(counted)
}
