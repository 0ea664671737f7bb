//! What a person needs to find out why a check failed, gathered before the lab forgets it.
//!
//! Every host is asked twice, with attempts to reach the guests in between: which counters moved says
//! how far packets come, and which did not, where they are lost.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use futures::future::join_all;

use crate::lab::{Guest, Host, Lab, Role};

use super::inside;
use super::vm::RunningVm;

/// What is asked of a node, by the file that the answers go to.
const OF_NODE: [(&str, &[&str]); 5] = [
    (
        "switch",
        &[
            "ovs-ofctl dump-ports-desc br-int",
            "ovs-ofctl dump-ports br-int",
            "ovs-vsctl --columns=name,ofport,external_ids,statistics,error list Interface",
            "ovs-appctl coverage/show",
        ],
    ),
    ("flows", &["ovs-ofctl dump-flows br-int"]),
    (
        "datapath",
        &[
            "ovs-appctl dpctl/show -s",
            "ovs-appctl dpctl/dump-flows -m",
            "ovs-appctl tnl/arp/show",
            "ovs-appctl tnl/ports/show -v",
        ],
    ),
    ("links", &["ip -s -d link show", "ip neigh show"]),
    (
        "daemons",
        &[
            "ovn-appctl -t ovn-controller connection-status",
            "ovn-appctl -t ovn-controller ct-zone-list",
            "virsh --quiet list --all",
            "for domain in $(virsh --quiet list --name); do virsh --quiet domjobinfo $domain; done",
            "tail -n 50 /var/log/libvirt/*.log /var/log/libvirt/qemu/*.log",
            // proc_pid_stat(5): what each thread does, and for how long it did.
            "cat /proc/[0-9]*/task/[0-9]*/stat",
        ],
    ),
];

/// What is asked of central.
const OF_CENTRAL: [(&str, &[&str]); 2] = [
    (
        "northbound",
        &[
            "ovn-nbctl show",
            "ovn-nbctl list Logical_Switch_Port",
            "ovn-nbctl list Address_Set",
        ],
    ),
    (
        "southbound",
        &[
            "ovn-sbctl list Port_Binding",
            "ovn-sbctl --uuid lflow-list",
            "ovn-sbctl list Chassis",
            "ovn-sbctl list Chassis_Private",
            "ovn-sbctl list FDB",
            "ovn-sbctl list MAC_Binding",
            "ovn-sbctl list Multicast_Group",
        ],
    ),
];

/// What makes each layer compute anew from the one above it. The first after which a guest answers
/// names the layer that had not followed.
const REMEDIES: [(Role, &str); 4] = [
    (Role::Node, "ovs-appctl revalidator/purge"),
    (Role::Node, "ovn-appctl -t ovn-controller lflow-cache/flush"),
    (
        Role::Node,
        "ovn-appctl -t ovn-controller inc-engine/recompute",
    ),
    (
        Role::Central,
        "ovn-appctl -t ovn-northd inc-engine/recompute",
    ),
];

/// What is written of a guest that does not answer.
const SILENT: &str = "silent";

/// What is asked of a guest, over its serial port.
const OF_GUEST: &str = "uptime; top -b -n 1 | head -n 12; cat /proc/softirqs /proc/interrupts; \
                        cat /sys/devices/system/clocksource/clocksource0/current_clocksource; \
                        ip -s link; ip addr; ip route; ip -6 route; ip neigh; netstat -ntua; \
                        cat /proc/net/snmp /proc/net/softnet_stat; dmesg | tail -n 40";

/// Writes to `dir` what the hosts and the guests say of themselves, and returns where.
///
/// # Errors
/// When the files cannot be written. What cannot be asked is said in the files.
pub(super) async fn gather(
    lab: &Lab,
    vms: &[RunningVm],
    guests: &[Guest],
    dir: &Path,
) -> Result<PathBuf> {
    if let Err(error) = fs::remove_dir_all(dir)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        return Err(error).with_context(|| dir.display().to_string());
    }
    let mut tried = String::new();
    for round in ["before", "after"] {
        let into = dir.join(round);
        fs::create_dir_all(&into).with_context(|| into.display().to_string())?;
        let hosts = lab.hosts().iter().map(|host| ask_host(host, &into));
        let guests = guests.iter().map(|guest| ask_guest(lab, guest, &into));
        let (hosts, guests) = futures::join!(join_all(hosts), join_all(guests));
        hosts.into_iter().chain(guests).collect::<Result<()>>()?;
        if round == "before" {
            tried.push_str(&knock(lab, vms).await);
        }
    }
    if tried.contains(SILENT) {
        tried.push_str(&remedy(lab, vms).await);
    }
    let path = dir.join("attempts.txt");
    fs::write(&path, tried).with_context(|| path.display().to_string())?;
    Ok(dir.to_owned())
}

/// Makes one layer after the other compute anew, and says after which the guests answer.
async fn remedy(lab: &Lab, vms: &[RunningVm]) -> String {
    let mut said = String::new();
    for (role, command) in REMEDIES {
        for host in lab.hosts().iter().filter(|host| host.role() == role) {
            let done = host.run("sh", ["-c", command]).await;
            let done = done.map_or_else(|error| format!("{error:#}"), |_| "done".to_owned());
            let heard = knock(lab, vms).await;
            _ = writeln!(said, "# {command} on {}: {done}\n{heard}", host.name());
            if !heard.contains(SILENT) {
                return said;
            }
        }
    }
    said
}

/// Tries every guest once, and says what came of it.
async fn knock(lab: &Lab, vms: &[RunningVm]) -> String {
    let mut said = String::new();
    let client = match lab.host("client") {
        Ok(client) => client,
        Err(error) => return format!("{error:#}\n"),
    };
    for vm in vms {
        for address in vm.addresses() {
            let answer = match inside::answers(client, address).await {
                Ok(()) => "answers".to_owned(),
                Err(error) => format!("{SILENT}: {error:#}"),
            };
            // Writing to a string cannot fail.
            _ = writeln!(said, "{} at {address}: {answer}", vm.spec.key());
        }
    }
    said
}

async fn ask_host(host: &Host, dir: &Path) -> Result<()> {
    let questions: &[(&str, &[&str])] = match host.role() {
        Role::Node => &OF_NODE,
        Role::Central => &OF_CENTRAL,
        Role::Client | Role::Outside => &[("links", &["ip -s -d link show", "ip neigh show"])],
    };
    for (file, commands) in questions {
        let mut text = String::new();
        for command in *commands {
            let answer = host.run("sh", ["-c", command]).await;
            let answer = answer.unwrap_or_else(|error| format!("{error:#}"));
            _ = writeln!(text, "# {command}\n{answer}\n");
        }
        let path = dir.join(format!("{}-{file}.txt", host.name()));
        fs::write(&path, text).with_context(|| path.display().to_string())?;
    }
    Ok(())
}

/// Asks the guest wherever it runs.
async fn ask_guest(lab: &Lab, guest: &Guest, dir: &Path) -> Result<()> {
    for node in lab.nodes() {
        if !guest.runs_on(node).await.unwrap_or(false) {
            continue;
        }
        let answer = guest.run(node, OF_GUEST).await;
        let answer = answer.unwrap_or_else(|error| format!("{error:#}"));
        let path = dir.join(format!("{}-guest-{}.txt", node.name(), guest.name()));
        fs::write(&path, answer + "\n").with_context(|| path.display().to_string())?;
    }
    Ok(())
}
