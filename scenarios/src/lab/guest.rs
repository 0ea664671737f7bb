//! Guests: their interfaces on a node, their domain, their first sign of life.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::PathBuf,
};

use anyhow::{Context as _, Result, ensure};
use futures::future::try_join_all;
use uuid::Uuid;

use super::{
    Lab,
    domain::{self, Boot},
    host::{Host, wait_until},
    image::{GUEST_DIR, content_hash},
    initramfs,
    mac::MacAddr,
    routed::{GATEWAY4, GATEWAY6},
    shell,
};

/// How many frames a guest's tap holds while nobody reads them: what arrives while the guest is paused must find room.
pub(crate) const TAP_QUEUE: u32 = 4_000;
/// The port of the reflector in every guest, UDP and TCP.
pub const REFLECTOR: u16 = 7_000;

/// What a guest's console says once its network is set up and its programs are started.
/// It says so after its server on port 7000 has begun to listen.
const READY: &str = "segue: ready";

/// An interface of a guest or of the client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nic {
    /// The logical switch port that it is.
    pub lsp: String,
    /// Its Ethernet address.
    pub mac: MacAddr,
    /// Its IPv4 address and prefix length.
    pub v4: Option<(Ipv4Addr, u8)>,
    /// Its IPv6 address and prefix length.
    pub v6: Option<(Ipv6Addr, u8)>,
    /// Where the IPv4 default route goes; it may be outside the prefix.
    pub gateway4: Option<Ipv4Addr>,
    /// Where the IPv6 default route goes; usually a link-local address.
    pub gateway6: Option<Ipv6Addr>,
    /// Whether a guest asks DHCP for its addresses and its IPv4 routes. Where its system has no client for DHCPv6
    /// (Debian 12), it is told its IPv6 address.
    pub dhcp: bool,
}

/// An entry of a guest's neighbour table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Neighbour {
    /// Whose entry it is.
    pub address: IpAddr,
    /// The Ethernet address; none while it is looked for or could not be found.
    pub mac: Option<MacAddr>,
    /// As `ip neigh` names it: `REACHABLE`, `STALE`, `FAILED` and so on.
    pub state: String,
}

/// How a guest's processor is had.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Accel {
    /// Emulated by QEMU: works everywhere.
    #[default]
    Tcg,
    /// Virtualised by the kernel. That `/dev/kvm` opens does not mean that it works.
    Kvm,
}

/// What a guest is to be.
#[derive(Clone, Debug)]
pub struct GuestSpec {
    /// Name of the domain.
    pub name: String,
    /// Identity of the domain, the same before and after a migration.
    pub uuid: Uuid,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Number of processors.
    pub vcpus: u32,
    /// How its processor is had.
    pub accel: Accel,
    /// Its interfaces.
    pub nics: Vec<Nic>,
    /// A static `dataplane-probe` to run in it as reflector.
    pub probe: Option<PathBuf>,
}

/// A guest that can run on any node of its lab.
#[derive(Clone, Debug)]
pub struct Guest {
    spec: GuestSpec,
    xml: String,
}

// === impl Accel ===

impl Accel {
    /// As reports name it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tcg => "tcg",
            Self::Kvm => "kvm",
        }
    }
}

// === impl Nic ===

impl Nic {
    /// Name of the host interface behind a guest's interface, the same on every node: the logical switch port's name
    /// where that fits into the 15 characters of an interface name.
    pub fn tap(&self) -> String {
        let fits = self.lsp.len() <= 15
            && self
                .lsp
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || "_-.".contains(c));
        if fits {
            self.lsp.clone()
        } else {
            format!("tap{:.12}", content_hash(self.lsp.as_bytes()))
        }
    }

    /// Its addresses.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> + use<> {
        let v4 = self.v4.map(|(address, _)| IpAddr::V4(address));
        let v6 = self.v6.map(|(address, _)| IpAddr::V6(address));
        v4.into_iter().chain(v6)
    }
}

// === impl Neighbour ===

impl Neighbour {
    /// Reads a line of busybox's `ip neigh`, such as
    /// `169.254.1.1 dev eth0 lladdr 0a:58:a9:fe:01:01 ref 1 used 0/0/0 probes 0 REACHABLE`.
    fn parse(line: &str) -> Option<Self> {
        let words: Vec<_> = line.split_whitespace().collect();
        let (address, state) = (words.first()?.parse().ok()?, *words.last()?);
        let mac = words.iter().skip_while(|word| **word != "lladdr").nth(1);
        Some(Self {
            address,
            mac: mac.and_then(|mac| mac.parse().ok()),
            state: state.to_owned(),
        })
    }
}

/// Creates guests' interfaces on a node and puts them on the integration bridge.
pub async fn plug(node: &Host, nics: &[Nic]) -> Result<()> {
    try_join_all(nics.iter().map(|nic| plug_as(node, nic, &nic.lsp)))
        .await
        .map(drop)
}

/// Creates a guest's interface on a node and puts it on the integration bridge as a logical switch port.
pub async fn plug_as(node: &Host, nic: &Nic, lsp: &str) -> Result<()> {
    let tap = nic.tap();
    node.netns()
        .ip(&[
            format!("tuntap add dev {tap} mode tap"),
            format!("link set {tap} txqueuelen {TAP_QUEUE} up"),
        ])
        .await?;
    node.ovs()
        .add_port(&tap, lsp)
        .await
        .with_context(|| format!("plug {lsp} on {}", node.name()))
}

/// Removes guests' interfaces from a node.
pub async fn unplug(node: &Host, nics: &[Nic]) -> Result<()> {
    for nic in nics {
        let tap = nic.tap();
        node.ovs().del_port(&tap).await?;
        node.netns()
            .ip(&[format!("link del {tap}")])
            .await
            .with_context(|| format!("unplug {} on {}", nic.lsp, node.name()))?;
    }
    Ok(())
}

// === impl GuestSpec ===

impl GuestSpec {
    /// A small emulated guest: 128 MiB, one processor.
    pub fn new(name: &str, nics: Vec<Nic>) -> Self {
        Self {
            name: name.to_owned(),
            uuid: Uuid::new_v5(&Uuid::NAMESPACE_OID, name.as_bytes()),
            memory_mib: 128,
            vcpus: 1,
            accel: Accel::default(),
            nics,
            probe: None,
        }
    }

    /// The file in a node that the guest's console is written to.
    pub fn console(&self) -> String {
        format!("/var/log/guests/{}.log", self.name)
    }

    /// The socket in a node behind which the guest takes commands.
    pub(super) fn shell(&self) -> String {
        format!("/run/guests/{}.sock", self.name)
    }

    /// The interface as the guest's first process reads it from the kernel's command line.
    fn nic_word(nic: &Nic) -> String {
        fn or_dash(value: Option<String>) -> String {
            value.unwrap_or_else(|| "-".to_owned())
        }
        let how = if nic.dhcp { "dhcp:" } else { "" };
        // DHCP says where IPv4 packets go; of IPv6 routes it knows nothing.
        let gateway4 = nic.gateway4.filter(|_| !nic.dhcp);
        format!(
            "segue.nic={},{},{},{},{}",
            nic.mac,
            or_dash(
                nic.v4
                    .map(|(address, bits)| format!("{how}{address}/{bits}"))
            ),
            or_dash(
                nic.v6
                    .map(|(address, bits)| format!("{how}{address}/{bits}"))
            ),
            or_dash(gateway4.map(|gateway| gateway.to_string())),
            or_dash(nic.gateway6.map(|gateway| gateway.to_string())),
        )
    }
}

// === impl Guest ===

impl Guest {
    /// Makes what the guest boots from. Nothing runs yet.
    pub fn prepare(lab: &Lab, spec: GuestSpec) -> Result<Self> {
        ensure!(
            !spec.name.is_empty()
                && spec
                    .name
                    .chars()
                    .all(|c| c.is_ascii_alphanumeric() || "_-.".contains(c)),
            "guest name {:?}: use letters, digits, dots, dashes and underscores",
            spec.name
        );
        let dir = lab.name().state_dir().join("guests");
        let initramfs = initramfs::build(lab.image(), spec.probe.as_deref(), &dir)
            .with_context(|| format!("initramfs of guest {}", spec.name))?;
        let nics: Vec<_> = spec.nics.iter().map(GuestSpec::nic_word).collect();
        let boot = Boot {
            kernel: format!("/boot/vmlinuz-{}", lab.image().kernel()?),
            initramfs: format!("{GUEST_DIR}/{initramfs}"),
            // A panic ends the guest at once instead of leaving it to be waited for. The mitigations of processor
            // faults guard nothing here and double what a packet costs under emulation.
            cmdline: format!(
                "console=ttyS0 panic=-1 quiet mitigations=off rdinit=/init {}",
                nics.join(" ")
            ),
        };
        let xml = domain::xml(&spec, &boot);
        Ok(Self { spec, xml })
    }

    /// What it is.
    pub fn spec(&self) -> &GuestSpec {
        &self.spec
    }

    /// Name of its domain.
    pub fn name(&self) -> &str {
        &self.spec.name
    }

    /// Creates the guest's interfaces on a node: before it starts there, and on the target before a migration.
    pub async fn plug(&self, node: &Host) -> Result<()> {
        plug(node, &self.spec.nics).await
    }

    /// Removes the guest's interfaces from a node.
    pub async fn unplug(&self, node: &Host) -> Result<()> {
        unplug(node, &self.spec.nics).await
    }

    /// Plugs and boots the guest on a node and returns once it is ready.
    ///
    /// Its logical switch ports should exist, or it has no network when this returns.
    pub async fn start(&self, node: &Host) -> Result<()> {
        self.plug(node).await?;
        self.boot(node).await
    }

    /// Boots the guest on a node where it is plugged and returns once it is ready.
    pub async fn boot(&self, node: &Host) -> Result<()> {
        let file = format!("/tmp/{}.xml", self.spec.name);
        node.create_file(&file, &self.xml)?;
        node.libvirt().virsh(["create", &file]).await?;
        node.prefer()?;
        self.wait_ready(node).await
    }

    /// Returns once the guest that booted on this node says that its network is set up.
    pub async fn wait_ready(&self, node: &Host) -> Result<()> {
        let console = node.path(&self.spec.console());
        let what = format!(
            "guest {} to boot (its console: {})",
            self.spec.name,
            console.display()
        );
        wait_until(&what, || match fs::read(&console) {
            Ok(text) => Ok(String::from_utf8_lossy(&text).contains(READY)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error).context("console"),
        })
        .await
    }

    /// Whether the guest runs on this node: its domain exists there and is not paused.
    pub async fn runs_on(&self, node: &Host) -> Result<bool> {
        let running = node
            .libvirt()
            .virsh(["list", "--state-running", "--name"])
            .await?;
        Ok(running.lines().any(|name| name == self.spec.name))
    }

    /// Runs a command of the guest's shell on the node where the guest runs, over a serial port: it needs no network
    /// and disturbs none. One command at a time; a second one waits for the first.
    ///
    /// # Errors
    /// When the command fails, with what it wrote, or takes longer than 30 s: then it is ended.
    pub async fn run(&self, node: &Host, command: &str) -> Result<String> {
        let socket = node.path(&self.spec.shell());
        shell::run(&socket, command)
            .await
            .with_context(|| format!("in guest {} on {}", self.spec.name, node.name()))
    }

    /// What the guest knows of its gateways 169.254.1.1 and fe80::1 at this moment.
    pub async fn gateway_entries(&self, node: &Host) -> Result<Vec<Neighbour>> {
        let table = self.run(node, "ip neigh show").await?;
        let is_gateway = |entry: &Neighbour| {
            entry.address == IpAddr::V4(GATEWAY4) || entry.address == IpAddr::V6(GATEWAY6)
        };
        Ok(table
            .lines()
            .filter_map(Neighbour::parse)
            .filter(is_gateway)
            .collect())
    }

    /// Ends the guest on a node at once and removes its interfaces.
    pub async fn destroy(&self, node: &Host) -> Result<()> {
        node.libvirt().virsh(["destroy", &self.spec.name]).await?;
        self.unplug(node).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::topology::Subnet;

    #[test]
    fn interface_names_fit_and_stay_apart() {
        let names = [
            "vm1",
            "a-rather-long-port-name-1",
            "a-rather-long-port-name-2",
            "what/ever",
        ];
        let taps = names.map(|lsp| Subnet(0).nic(lsp, 10).tap());
        for tap in &taps {
            assert!(tap.len() <= 15 && !tap.contains('/'), "{tap}");
        }
        let distinct: std::collections::BTreeSet<_> = taps.iter().collect();
        assert_eq!(distinct.len(), taps.len());
        assert_eq!(taps[0], "vm1");
    }

    #[test]
    fn a_guest_with_dhcp_is_told_to_ask() {
        let nic = Nic {
            gateway4: Some(GATEWAY4),
            gateway6: Some(GATEWAY6),
            dhcp: true,
            ..Subnet(0).nic("vm1", 10)
        };
        assert_eq!(
            GuestSpec::nic_word(&nic),
            "segue.nic=0a:58:0a:80:00:0a,dhcp:10.128.0.10/24,dhcp:fd00:10:128::a/64,-,fe80::1"
        );
    }

    #[test]
    fn neighbours_are_read_as_busybox_prints_them() {
        let found = Neighbour::parse(
            "169.254.1.1 dev eth0 lladdr 0a:58:a9:fe:01:01 ref 1 used 0/0/0 probes 4 REACHABLE",
        )
        .unwrap();
        assert_eq!(found.address, IpAddr::V4(GATEWAY4));
        assert_eq!(found.mac.unwrap().to_string(), "0a:58:a9:fe:01:01");
        assert_eq!(found.state, "REACHABLE");
        let lost = Neighbour::parse("fe80::1 dev eth0  used 0/0/0 probes 6 FAILED").unwrap();
        assert_eq!((lost.mac, lost.state.as_str()), (None, "FAILED"));
        assert_eq!(Neighbour::parse(""), None);
    }

    #[test]
    fn an_interface_is_described_to_the_guest_in_full() {
        let nic = Subnet(0).nic("vm1", 10);
        assert_eq!(
            GuestSpec::nic_word(&nic),
            "segue.nic=0a:58:0a:80:00:0a,10.128.0.10/24,fd00:10:128::a/64,-,-"
        );
    }
}
