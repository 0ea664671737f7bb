//! What a program may do, and what the kernel says that it may.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

/// Capabilities by their number, capabilities(7), without `CAP_`.
const CAPABILITIES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// A capability, such as `NET_RAW`, by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Capability(usize);

/// What a program may do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rights {
    /// The user.
    pub user: u32,
    /// Its group.
    pub group: u32,
    /// Further groups.
    pub groups: BTreeSet<u32>,
    /// All that the program could ever have. A user other than root has none of them (execve(2)).
    pub capabilities: BTreeSet<Capability>,
    /// Whether no program that it starts may do more than it does (`no_new_privs`, prctl(2)).
    pub no_new_privileges: bool,
    /// Whether it cannot write to its root; what is mounted there is said with each mount.
    pub read_only_root: bool,
}

/// Rights as the kernel tells of them.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Seen {
    users: BTreeSet<u32>,
    /// Real, effective, saved and for files.
    own_groups: BTreeSet<u32>,
    groups: BTreeSet<u32>,
    inheritable: u64,
    permitted: u64,
    effective: u64,
    bounding: u64,
    ambient: u64,
    no_new_privileges: bool,
    read_only_root: bool,
}

impl Seen {
    pub(super) fn of(rights: &Rights) -> Self {
        let bounding = mask(&rights.capabilities);
        let granted = if rights.user == 0 { bounding } else { 0 };
        Self {
            users: [rights.user].into(),
            own_groups: [rights.group].into(),
            groups: rights.groups.clone(),
            inheritable: 0,
            permitted: granted,
            effective: granted,
            bounding,
            ambient: 0,
            no_new_privileges: rights.no_new_privileges,
            read_only_root: rights.read_only_root,
        }
    }
}

// === impl Capability ===

impl Capability {
    fn bit(self) -> u64 {
        1 << self.0
    }
}

impl TryFrom<String> for Capability {
    type Error = anyhow::Error;

    fn try_from(name: String) -> Result<Self> {
        let bare = name.strip_prefix("CAP_").unwrap_or(&name);
        let number = CAPABILITIES.iter().position(|known| *known == bare);
        let number = number.with_context(|| format!("there is no capability {name:?}"))?;
        Ok(Self(number))
    }
}

impl From<Capability> for String {
    fn from(capability: Capability) -> Self {
        let name = CAPABILITIES.get(capability.0).copied();
        // There is no other way to make one than by its name.
        name.unwrap_or_default().to_owned()
    }
}

/// Reads `/proc/PID/status` and `/proc/PID/mounts` (proc_pid_status(5), proc_pid_mounts(5)).
pub(super) fn rights_in(status: &str, mounts: &str) -> Result<Seen> {
    let field = |name: &str| {
        let mut lines = status.lines();
        let line = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.map(str::trim).with_context(|| format!("no {name}"))
    };
    let numbers = |name: &str| -> Result<BTreeSet<u32>> {
        let words = field(name)?.split_whitespace();
        words.map(|word| Ok(word.parse()?)).collect()
    };
    let capabilities =
        |name: &str| u64::from_str_radix(field(name)?, 16).with_context(|| name.to_owned());
    // The last one mounted on a place is the one that is seen.
    let root = mounts.lines().rev().find_map(|line| {
        let mut words = line.split_whitespace().skip(1);
        (words.next()? == "/").then(|| words.nth(1))?
    });
    let options = root.context("no root")?;
    Ok(Seen {
        users: numbers("Uid")?,
        own_groups: numbers("Gid")?,
        groups: numbers("Groups")?,
        inheritable: capabilities("CapInh")?,
        permitted: capabilities("CapPrm")?,
        effective: capabilities("CapEff")?,
        bounding: capabilities("CapBnd")?,
        ambient: capabilities("CapAmb")?,
        no_new_privileges: field("NoNewPrivs")? == "1",
        read_only_root: options.split(',').any(|option| option == "ro"),
    })
}

pub(super) fn mask(capabilities: &BTreeSet<Capability>) -> u64 {
    capabilities.iter().fold(0, |mask, one| mask | one.bit())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn capabilities(names: &[&str]) -> BTreeSet<Capability> {
        let made = names
            .iter()
            .map(|name| Capability::try_from((*name).to_owned()));
        made.map(Result::unwrap).collect()
    }

    #[test]
    fn capabilities_have_the_kernels_numbers() {
        assert_eq!(mask(&capabilities(&["DAC_OVERRIDE", "NET_RAW"])), 0x2002);
        assert_eq!(mask(&capabilities(&["CAP_CHECKPOINT_RESTORE"])), 1 << 40);
        assert!(Capability::try_from("NET_RAWER".to_owned()).is_err());
    }

    const STATUS: &str = "Name:\tnode-hooks\nUid:\t0\t0\t0\t0\nGid:\t0\t0\t0\t0\nGroups:\t \n\
        CapInh:\t0000000000000000\nCapPrm:\t0000000000002002\nCapEff:\t0000000000002002\n\
        CapBnd:\t0000000000002002\nCapAmb:\t0000000000000000\nNoNewPrivs:\t1\n";
    const MOUNTS: &str = "overlay / overlay ro,relatime,lowerdir=/x 0 0\nproc /proc proc rw 0 0\n";

    #[test]
    fn what_the_kernel_says_is_compared_in_every_point() {
        let rights = Rights {
            user: 0,
            group: 0,
            groups: BTreeSet::new(),
            capabilities: capabilities(&["NET_RAW", "DAC_OVERRIDE"]),
            no_new_privileges: true,
            read_only_root: true,
        };
        let due = Seen::of(&rights);
        assert_eq!(rights_in(STATUS, MOUNTS).unwrap(), due);
        for (from, to) in [
            ("CapEff:\t0000000000002002", "CapEff:\t0000000000003002"),
            ("CapBnd:\t0000000000002002", "CapBnd:\t000001ffffffffff"),
            ("NoNewPrivs:\t1", "NoNewPrivs:\t0"),
            ("Uid:\t0\t0", "Uid:\t0\t1"),
            ("Groups:\t ", "Groups:\t7 "),
        ] {
            let other = STATUS.replace(from, to);
            assert_ne!(rights_in(&other, MOUNTS).unwrap(), due, "{to}");
        }
        let writable = MOUNTS.replace("ro,", "rw,");
        assert_ne!(rights_in(STATUS, &writable).unwrap(), due);
    }

    #[test]
    fn another_user_than_root_has_no_capability() {
        let rights = Rights {
            user: 65_532,
            group: 65_532,
            groups: BTreeSet::new(),
            capabilities: capabilities(&["NET_RAW"]),
            no_new_privileges: true,
            read_only_root: true,
        };
        let seen = Seen::of(&rights);
        assert_eq!((seen.effective, seen.permitted), (0, 0));
        assert_eq!(seen.bounding, 0x2000);
    }
}
