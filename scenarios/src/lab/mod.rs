//! A real lab on one machine: OVN, Open vSwitch, libvirt and QEMU on several hosts that are namespaces.
//!
//! # Layout
//! ```text
//!  segue-<lab>-central        segue-<lab>-node1 … node3                 segue-<lab>-client
//!  NB, SB, northd             ovsdb-server, ovs-vswitchd,               eth0
//!  172.30.0.1 on "underlay"   ovn-controller, libvirtd, guests           │
//!        │                    172.30.0.11… on br-phys ── eth0            │
//!        └──── veth, MTU 1600 ────────────────────────────┘    br-int of the last node
//! ```
//! Beside the underlay is a network that no switch of a node has a part in (172.30.1.1, 172.30.1.11…): guests' memory is
//! copied there, and segue's controller and agents talk there. One more host, `outside`, is alone until a
//! [`routed::RoutedNetwork`] connects it with the nodes.
//!
//! Every host is a named network namespace and a first process with process, mount, host name and IPC namespaces of
//! its own, whose root is a Debian [`Image`] mounted read-only, with directories of its own over it.
//!
//! # Use
//! [`Lab::up`] brings a lab up, [`Lab::down`] takes it down; so does dropping it, and so does the next [`Lab::up`] of
//! the same name after a crash. [`Lab::keep`] leaves it running for [`Lab::attach`]. A [`Host`] runs commands
//! ([`Host::command`], [`Host::netns_command`]), a [`Guest`] is plugged, started and migrated
//! ([`libvirt::migrate`]), [`events::follow`] tells what the hypervisors do, [`topology`] and [`routed`] write what OVN
//! needs.
//!
//! # Guarantees
//! - Nothing enters the machine's own network namespace, and nothing of the image is changed.
//! - Killing the first process of a host ends everything in it.
//! - Teardown goes by the lab's name, not by a record of what was done; it goes on after an error and reports all.
//!
//! # Caveats
//! Root is needed. Open vSwitch runs its userspace datapath, so throughput is not a real machine's. Guests are
//! emulated unless KVM is asked for, and an emulated guest's clock is not this machine's.

use std::{
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail, ensure};
use futures::future::try_join_all;
use serde::{Deserialize, Serialize};

mod client;
pub mod contain;
mod daemon;
pub mod domain;
pub mod events;
pub mod exec;
pub mod guest;
mod host;
mod image;
pub mod initramfs;
pub mod isolation;
pub mod libvirt;
mod lock;
mod mac;
mod name;
mod netns;
pub mod node;
mod ovn;
mod ovs;
mod proc;
mod progress;
pub mod routed;
mod shell;
mod state;
mod sweep;
pub mod topology;

pub use client::ClientSpec;
pub use daemon::Daemon;
pub(crate) use guest::TAP_QUEUE;
pub use guest::{Accel, Guest, GuestSpec, Neighbour, Nic, REFLECTOR};
pub use host::{Host, HostProcess, Role};
pub use image::{Image, Suite};
pub use mac::MacAddr;
pub use name::LabName;
pub use ovs::{INTEGRATION_BRIDGE, Ovs};
pub use proc::ProcessId;
pub(crate) use proc::{Prompt, prefer_at_start};
pub use progress::{Progress, Quiet, Terminal};
pub use sweep::Swept;

use lock::LabLock;

/// What a lab is to be.
#[derive(Clone, Debug)]
pub struct LabSpec {
    /// Its name; labs of different names coexist.
    pub name: LabName,
    /// The Debian suite of its hosts.
    pub suite: Suite,
    /// How many nodes, 1 to 3. The client is attached to the last: with 3 nodes guests can migrate between the first
    /// two and the client stays a stranger to both.
    pub nodes: u8,
    /// Whether the nodes run libvirt; without it they have no guests.
    pub hypervisors: bool,
    /// The client's port.
    pub client: ClientSpec,
    /// Where the logs of all hosts are copied when the lab goes down, however that comes about, or fails to come up.
    pub logs: Option<PathBuf>,
    /// The `scenarios` program, whose hidden subcommands start and enter hosts.
    pub exe: PathBuf,
}

/// A running lab. Dropping it takes it down, unless it was [attached to](Self::attach) or is [kept](Self::keep).
#[derive(Debug)]
pub struct Lab {
    record: Record,
    /// Held from before the first thing is created until after the last is removed.
    lock: Option<LabLock>,
    /// Where the logs go when the lab goes down.
    logs: Option<PathBuf>,
}

/// What the state directory says of a lab.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Record {
    name: LabName,
    image: Image,
    hosts: Vec<Host>,
    /// Left running on purpose: not a leftover.
    kept: bool,
}

// === impl LabSpec ===

impl LabSpec {
    /// A lab of three nodes on Debian's stable suite, started by the program that runs now.
    pub fn new(name: LabName) -> Result<Self> {
        let exe = std::env::current_exe().context("path of this program")?;
        Ok(Self {
            name,
            suite: Suite::default(),
            nodes: 3,
            hypervisors: true,
            client: ClientSpec::default(),
            logs: None,
            exe,
        })
    }
}

// === impl Lab ===

impl Lab {
    pub(crate) const CENTRAL_UNDERLAY: Ipv4Addr = Ipv4Addr::new(172, 30, 0, 1);

    /// Brings a lab up: the image if there is none, hosts, OVN, libvirt, the client's interface. What a crashed run of
    /// the same name left behind is removed first.
    ///
    /// # Cancellation
    /// Dropping the future takes down what it has brought up.
    ///
    /// # Errors
    /// When a lab of this name is up or in use, or anything fails; then nothing is left behind.
    pub async fn up(spec: &LabSpec, progress: &dyn Progress) -> Result<Self> {
        ensure!(
            (1..=3).contains(&spec.nodes),
            "a lab has 1 to 3 nodes, not {}",
            spec.nodes
        );
        ensure!(
            nix::unistd::geteuid().is_root(),
            "the lab needs root: namespaces, mounts and taps"
        );
        let lock = LabLock::take(&spec.name)?;
        if let Some(record) =
            Record::load(&spec.name)?.filter(|record| record.kept && record.is_up())
        {
            bail!(
                "lab {0} is up already: `scenarios lab status --name {0}` shows it, `scenarios lab down --name {0}` \
                 removes it, another --name makes a second one",
                record.name
            );
        }
        let swept = sweep::sweep(&spec.name, None)?;
        if !swept.is_empty() {
            progress.step(&format!(
                "Removed what an earlier run of lab {} left behind: {} namespaces, {} processes",
                spec.name,
                swept.namespaces.len(),
                swept.processes
            ));
        }
        let image = Image::ensure(&spec.suite, progress).await?;
        // From here on, dropping `lab` removes whatever exists by then.
        let record = Record {
            name: spec.name.clone(),
            image,
            hosts: Vec::new(),
            kept: false,
        };
        let mut lab = Self {
            record,
            lock: Some(lock),
            logs: spec.logs.clone(),
        };
        progress.step(&format!("Starting the hosts of lab {}", spec.name));
        state::make(&spec.name)?;
        lab.start_hosts(spec).await?;
        progress.step(if spec.hypervisors {
            "Starting OVN, Open vSwitch and libvirt"
        } else {
            "Starting OVN and Open vSwitch"
        });
        lab.start_daemons(spec.hypervisors).await?;
        client::plug(&lab, &spec.client).await?;
        Ok(lab)
    }

    /// A lab that another process has brought up and left running, or is still using. Dropping this takes nothing
    /// down.
    ///
    /// # Errors
    /// When no lab of this name is up.
    pub fn attach(name: &LabName) -> Result<Self> {
        let record = Record::load(name)?.with_context(|| {
            format!("lab {name} is not up: `scenarios lab up --name {name}` brings it up")
        })?;
        Ok(Self {
            record,
            lock: None,
            logs: None,
        })
    }

    /// Leaves the lab running.
    pub fn keep(mut self) -> Result<()> {
        self.record.kept = true;
        self.record.store()?;
        // Without the lock, dropping takes nothing down.
        self.lock = None;
        Ok(())
    }

    /// Takes the lab down and says what was removed.
    ///
    /// # Errors
    /// Everything that went wrong; what could be removed is removed all the same.
    pub fn down(mut self) -> Result<Swept> {
        let lock = match self.lock.take() {
            Some(lock) => lock,
            None => LabLock::take(&self.record.name)?,
        };
        take_down(&self.record.name, lock, self.logs.as_deref())
    }

    /// Removes whatever exists under this name, a lab that is up as well as leftovers, after copying what logs there
    /// are to `logs/<host>/`.
    ///
    /// # Errors
    /// When a process is using the lab; otherwise as [`down`](Self::down).
    pub fn remove(name: &LabName, logs: Option<&Path>) -> Result<Swept> {
        take_down(name, LabLock::take(name)?, logs)
    }

    /// Its name.
    pub fn name(&self) -> &LabName {
        &self.record.name
    }

    /// The image of its hosts.
    pub fn image(&self) -> &Image {
        &self.record.image
    }

    /// All hosts: central, the nodes, the client, the outside.
    pub fn hosts(&self) -> &[Host] {
        &self.record.hosts
    }

    /// The nodes, in order.
    pub fn nodes(&self) -> impl Iterator<Item = &Host> {
        self.record
            .hosts
            .iter()
            .filter(|host| host.role == Role::Node)
    }

    /// A host by its name: `central`, `node1`…, `client`, `outside`.
    pub fn host(&self, name: &str) -> Result<&Host> {
        self.record
            .hosts
            .iter()
            .find(|host| host.name == name)
            .with_context(|| {
                let names: Vec<_> = self.record.hosts.iter().map(Host::name).collect();
                format!(
                    "lab {} has no host {name:?}; it has {}",
                    self.record.name,
                    names.join(", ")
                )
            })
    }

    /// The host with OVN's databases.
    pub fn central(&self) -> &Host {
        // `start_hosts` puts it first, before anybody sees the lab.
        &self.record.hosts[0]
    }

    async fn start_hosts(&mut self, spec: &LabSpec) -> Result<()> {
        let names = |index: u8| match index {
            0 => (
                "central".to_owned(),
                Role::Central,
                Some(Self::CENTRAL_UNDERLAY),
            ),
            index if index == spec.nodes + 1 => ("client".to_owned(), Role::Client, None),
            index if index > spec.nodes => ("outside".to_owned(), Role::Outside, None),
            index => (
                format!("node{index}"),
                Role::Node,
                Some(Ipv4Addr::new(172, 30, 0, 10 + index)),
            ),
        };
        let hosts: Vec<_> = (0..=spec.nodes + 2).map(names).collect();
        let known: String = hosts
            .iter()
            .filter_map(|(name, _, address)| Some(format!("{} {name}\n", (*address)?)))
            .collect();
        let record = &self.record;
        self.record.hosts = try_join_all(hosts.into_iter().map(|(name, role, underlay)| {
            let known = format!("127.0.0.1 localhost\n{known}");
            async move {
                let init = start_host(&record.name, &record.image, &name, &known, &spec.exe)
                    .await
                    .with_context(|| format!("start host {name}"))?;
                Ok::<_, anyhow::Error>(Host {
                    lab: record.name.clone(),
                    name,
                    role,
                    underlay,
                    init,
                    exe: spec.exe.clone(),
                })
            }
        }))
        .await?;
        self.record.store()
    }

    async fn start_daemons(&self, hypervisors: bool) -> Result<()> {
        let nodes: Vec<_> = self.nodes().collect();
        ovn::connect_underlay(self.central(), &nodes).await?;
        ovn::connect_management(self.central(), &nodes).await?;
        let central = ovn::start_central(self.central());
        let started = try_join_all((1u8..).zip(&nodes).map(|(index, node)| async move {
            let address = node.underlay.context("a node without underlay address")?;
            let switch = async {
                ovn::start_switch(node, index, address).await?;
                node.start(Daemon::OvnController).await
            };
            let hypervisor = async {
                if hypervisors {
                    libvirt::start(node, index).await?;
                }
                Ok(())
            };
            tokio::try_join!(switch, hypervisor)
                .map(drop)
                .with_context(|| format!("start {}", node.name))
        }));
        tokio::try_join!(central, started)?;
        ovn::introduce(&nodes).await?;
        self.wait_chassis().await
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if let Some(lock) = self.lock.take()
            && let Err(error) = take_down(&self.record.name, lock, self.logs.as_deref())
        {
            tracing::error!("{error:#}");
        }
    }
}

/// Removes the lab while its lock is held, and then the lock.
fn take_down(name: &LabName, lock: LabLock, logs: Option<&Path>) -> Result<Swept> {
    let swept = sweep::sweep(name, logs);
    let unlocked = lock.remove();
    let swept = swept?;
    unlocked.map(|()| swept)
}

// === impl Record ===

impl Record {
    fn path(name: &LabName) -> PathBuf {
        name.state_dir().join("lab.json")
    }

    fn load(name: &LabName) -> Result<Option<Self>> {
        let path = Self::path(name);
        match fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text)
                .map(Some)
                .with_context(|| path.display().to_string()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| path.display().to_string()),
        }
    }

    fn store(&self) -> Result<()> {
        let path = Self::path(&self.name);
        let new = path.with_extension("new");
        fs::write(&new, serde_json::to_vec_pretty(self)?)
            .with_context(|| new.display().to_string())?;
        fs::rename(&new, &path).with_context(|| path.display().to_string())
    }

    fn is_up(&self) -> bool {
        self.hosts.iter().all(Host::is_up)
    }
}

/// Creates a host's namespace and directories and starts its first process.
async fn start_host(
    lab: &LabName,
    image: &Image,
    name: &str,
    known: &str,
    exe: &Path,
) -> Result<ProcessId> {
    let dir = host::host_dir(lab, name);
    let root = lab.state_dir().join("roots").join(name);
    let guests = lab.state_dir().join("guests");
    for needed in [&dir, &root, &guests] {
        fs::create_dir_all(needed).with_context(|| needed.display().to_string())?;
    }
    let mut binds = vec![
        node::Bind {
            source: guests,
            target: image::GUEST_DIR.into(),
            read_only: true,
        },
        node::Bind {
            source: dir.join("hosts"),
            target: "/etc/hosts".into(),
            read_only: false,
        },
    ];
    fs::write(dir.join("hosts"), known).with_context(|| dir.display().to_string())?;
    for own in image::OWN_DIRS {
        let source = dir.join(own.trim_start_matches('/'));
        fs::create_dir_all(&source).with_context(|| source.display().to_string())?;
        binds.push(node::Bind {
            source,
            target: own.into(),
            read_only: false,
        });
    }
    for sub in [
        "run/ovn",
        "run/openvswitch",
        "run/lock",
        "run/guests",
        "var/log/ovn",
        "var/log/openvswitch",
        "var/log/guests",
        "var/log/libvirt",
    ] {
        fs::create_dir_all(dir.join(sub)).with_context(|| dir.display().to_string())?;
    }
    let netns = netns::Netns::new(lab.netns(name));
    netns.create().await?;
    let spec = node::InitSpec {
        hostname: name.to_owned(),
        image: image.dir().to_owned(),
        root,
        binds,
    };
    node::start_init(exe, &netns, &spec, &dir.join("var/log/init.log")).await
}
