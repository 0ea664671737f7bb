//! What a run runs on.

use std::fs;

use anyhow::{Context as _, Result, ensure};

use super::Environment;
use super::layout::NODES;
use super::table::grouped;
use crate::lab::Lab;

/// What the databases, northd, ovn-controller and Open vSwitch together take for one VM, and without any; measured.
const KIB_PER_VM: u64 = 160;
const KIB_AT_LEAST: u64 = 512 << 10;

pub(super) fn of(lab: &Lab) -> Result<Environment> {
    let uname = nix::sys::utsname::uname().context("uname")?;
    Ok(Environment {
        ovn: lab.image().package_version("ovn-central")?,
        ovs: lab.image().package_version("openvswitch-switch")?,
        cpus: std::thread::available_parallelism().map_or(0, usize::from),
        cpu: value_of("/proc/cpuinfo", "model name")?.unwrap_or_default(),
        kernel: uname.release().to_string_lossy().into_owned(),
        nodes: NODES,
    })
}

/// # Errors
/// When this machine has not the memory for so many VMs.
pub(super) fn ensure_memory(vms: u32) -> Result<()> {
    let available = value_of("/proc/meminfo", "MemAvailable")?.context("no MemAvailable")?;
    let available: u64 = available
        .trim_end_matches(" kB")
        .parse()
        .context("MemAvailable")?;
    let needed = KIB_AT_LEAST + KIB_PER_VM * u64::from(vms);
    ensure!(
        needed <= available,
        "{} VMs take some {} MiB of memory, and {} MiB are free: give smaller --sizes",
        grouped(vms.into()),
        needed >> 10,
        available >> 10
    );
    Ok(())
}

/// The value behind the first such key in a file of the kernel's.
fn value_of(path: &str, key: &str) -> Result<Option<String>> {
    let text = fs::read_to_string(path).context(path.to_owned())?;
    let found = text.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        (name.trim() == key).then(|| value.trim().to_owned())
    });
    Ok(found)
}
