//! OVN topologies for scenarios: which logical switches there are and which ports they have.

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context as _, Result};

use super::{
    Lab,
    guest::Nic,
    mac::MacAddr,
    routed::{GATEWAY4, GATEWAY6, PORT_KEY, is_routed},
};

/// One of a family of subnets that do not overlap: `10.(128+n).0.0/24` and `fd00:10:(128+n)::/64`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subnet(pub u8);

/// The topology *shared*: one logical switch that spans the nodes. A guest's port keeps its logical switch port and is
/// bound to two chassis for a while.
#[derive(Clone, Copy, Debug)]
pub struct SharedSwitch<'a> {
    lab: &'a Lab,
    subnet: Subnet,
}

// === impl Subnet ===

impl Subnet {
    const BITS_V4: u8 = 24;
    const BITS_V6: u8 = 64;

    /// An interface with the addresses of host number `host`, and an Ethernet address made from them
    /// ([`MacAddr::of`]).
    pub fn nic(self, lsp: &str, host: u8) -> Nic {
        let v4 = Ipv4Addr::new(10, self.second(), 0, host);
        let v6 = Ipv6Addr::new(0xfd00, 0x10, self.third(), 0, 0, 0, 0, host.into());
        Nic {
            lsp: lsp.to_owned(),
            mac: MacAddr::of(v4),
            v4: Some((v4, Self::BITS_V4)),
            v6: Some((v6, Self::BITS_V6)),
            gateway4: None,
            gateway6: None,
            dhcp: false,
        }
    }

    /// The subnet that an interface has its address of.
    pub fn of(nic: &Nic) -> Option<Self> {
        let (address, _) = nic.v4?;
        match address.octets() {
            [10, second @ 128..=255, 0, _] => Some(Self(second - 128)),
            _ => None,
        }
    }

    /// Its ranges, `<IPv4>,<IPv6>`.
    pub fn cidrs(self) -> String {
        let nic = self.nic("", 0);
        let v4 = nic.v4.map(|(address, bits)| format!("{address}/{bits}"));
        let v6 = nic.v6.map(|(address, bits)| format!("{address}/{bits}"));
        [v4, v6].into_iter().flatten().collect::<Vec<_>>().join(",")
    }

    /// The addresses that nobody else has, for somebody who wants gateways: `<IPv4>,<IPv6>`.
    pub fn gateways(self) -> String {
        let addresses = self.nic("", 1);
        let addresses: Vec<_> = addresses
            .addresses()
            .map(|address| address.to_string())
            .collect();
        addresses.join(",")
    }

    /// The name of its logical switch.
    pub fn switch(self) -> String {
        format!("shared{}", self.0)
    }

    /// The client's interface in this subnet.
    pub fn client(self) -> Nic {
        let lsp = if self.0 == 0 {
            "client".to_owned()
        } else {
            format!("client-{}", self.0)
        };
        self.nic(&lsp, 5)
    }

    fn second(self) -> u8 {
        128u8.saturating_add(self.0)
    }

    /// Written as people write it: the decimal digits of the IPv4 octet stand in the hexadecimal IPv6 address.
    fn third(self) -> u16 {
        let n = u16::from(self.second());
        ((n / 100) << 8) | ((n / 10 % 10) << 4) | (n % 10)
    }
}

// === impl SharedSwitch ===

impl<'a> SharedSwitch<'a> {
    /// Creates the logical switch, with the client's port in it.
    pub async fn create(lab: &'a Lab, subnet: Subnet) -> Result<Self> {
        let switch = Self { lab, subnet };
        lab.nbctl(["ls-add", &switch.name()]).await?;
        switch.add_port(&subnet.client(), &[]).await?;
        Ok(switch)
    }

    /// The logical switch, created unless an earlier run has.
    pub async fn ensure(lab: &'a Lab, subnet: Subnet) -> Result<Self> {
        let switch = Self { lab, subnet };
        if exists(lab, "Logical_Switch", &switch.name()).await? {
            return Ok(switch);
        }
        Self::create(lab, subnet).await
    }

    /// The logical switch of a lab that has one.
    pub fn attach(lab: &'a Lab, subnet: Subnet) -> Self {
        Self { lab, subnet }
    }

    /// The lowest host number, from `first` on, whose IPv4 address no port of the Northbound has.
    ///
    /// # Errors
    /// When the subnet is full.
    pub async fn free_host(&self, first: u8) -> Result<u8> {
        let taken = taken_addresses(self.lab).await?;
        let is_free = |host: &u8| {
            let v4 = self.subnet.nic("", *host).v4;
            v4.is_some_and(|(v4, _)| !taken.contains(&v4.to_string()))
        };
        (first..u8::MAX)
            .find(is_free)
            .with_context(|| format!("no address is left on {}", self.name()))
    }

    /// Its name in the Northbound database.
    pub fn name(&self) -> String {
        self.subnet.switch()
    }

    /// Its addresses.
    pub fn subnet(&self) -> Subnet {
        self.subnet
    }

    /// Adds a logical switch port with its addresses, and `external_ids` as whoever owns it would write them, such as
    /// `("segue.io/vm", "default/vm1")`. Returns once the Southbound database has it.
    pub async fn add_port(&self, nic: &Nic, external_ids: &[(&str, &str)]) -> Result<()> {
        let mut args = vec!["--wait=sb".to_owned()];
        args.extend(lsp_add(&self.name(), nic, external_ids));
        self.lab.nbctl(args).await.map(drop)
    }

    /// Adds the port of a pod on `node` whose VM has the addresses of `nic`. It says whose it is, unless that is nobody's
    /// business. Returns once the Southbound database has it.
    ///
    /// Where a port has the addresses already, the pod is one that its VM migrates to, and nothing is added.
    pub async fn add_pod_port(
        &self,
        nic: &Nic,
        node: &str,
        lsp: &str,
        vm: Option<&str>,
    ) -> Result<()> {
        if is_taken(self.lab, nic).await? {
            return Ok(());
        }
        let mut args = vec!["--wait=sb".to_owned()];
        args.extend(pod_port(&self.name(), nic, node, lsp, vm).join(&"--".to_owned()));
        self.lab.nbctl(args).await.map(drop)
    }

    /// Removes the port of a pod, unless somebody has.
    pub async fn del_pod_port(&self, lsp: &str) -> Result<()> {
        let delete = ["--if-exists", "lsp-del", lsp];
        self.lab.nbctl(delete).await.map(drop)
    }

    /// Removes a logical switch port, if it is there, or those of the VM's pods.
    pub async fn del_port(&self, lsp: &str) -> Result<()> {
        let of_pods = self.lab.nbctl(find_of_pods("Logical_Switch_Port", lsp));
        let mut args = ["--wait=sb", "--if-exists", "lsp-del", lsp]
            .map(str::to_owned)
            .to_vec();
        for row in of_pods.await?.split_whitespace() {
            args.extend(["--", "--if-exists", "lsp-del", row].map(str::to_owned));
        }
        self.lab.nbctl(args).await.map(drop)
    }
}

/// A guest's interface with these addresses of the lab, the first of each family: whether they are a routed network's
/// or a shared one's decides what goes with them.
pub fn guest_nic(lsp: &str, mac: MacAddr, addresses: &[IpAddr]) -> Nic {
    let v4 = addresses.iter().find_map(|address| match address {
        IpAddr::V4(address) => Some(*address),
        IpAddr::V6(_) => None,
    });
    let v6 = addresses.iter().find_map(|address| match address {
        IpAddr::V6(address) => Some(*address),
        IpAddr::V4(_) => None,
    });
    let routed = addresses.iter().any(|address| is_routed(*address));
    let (bits_v4, bits_v6) = if routed {
        (32, 128)
    } else {
        (Subnet::BITS_V4, Subnet::BITS_V6)
    };
    Nic {
        lsp: lsp.to_owned(),
        mac,
        v4: v4.map(|address| (address, bits_v4)),
        v6: v6.map(|address| (address, bits_v6)),
        gateway4: v4.filter(|_| routed).map(|_| GATEWAY4),
        gateway6: v6.filter(|_| routed).map(|_| GATEWAY6),
        dhcp: routed,
    }
}

/// The arguments of `ovn-nbctl` that add a logical switch port with its addresses.
pub(super) fn lsp_add(switch: &str, nic: &Nic, external_ids: &[(&str, &str)]) -> Vec<String> {
    let addresses: Vec<_> = std::iter::once(nic.mac.to_string())
        .chain(nic.addresses().map(|address| address.to_string()))
        .collect();
    let addresses = addresses.join(" ");
    let lsp = nic.lsp.as_str();
    let words = [
        "lsp-add",
        switch,
        lsp,
        "--",
        "lsp-set-addresses",
        lsp,
        &addresses,
    ];
    let mut args: Vec<String> = words.map(Into::into).into();
    for (key, value) in external_ids {
        args.extend(["--", "set", "Logical_Switch_Port", lsp].map(Into::into));
        args.push(format!("external_ids:\"{key}\"=\"{value}\""));
    }
    args
}

/// The commands of `ovn-nbctl` that add the port of a pod on `node` to a switch: with the addresses of `nic`, and a word
/// that it has in common with the other ports of the VM's pods.
pub(super) fn pod_port(
    switch: &str,
    nic: &Nic,
    node: &str,
    lsp: &str,
    vm: Option<&str>,
) -> [Vec<String>; 2] {
    let of_pod = Nic {
        lsp: lsp.to_owned(),
        ..nic.clone()
    };
    let mut ids = vec![(PORT_KEY, nic.lsp.as_str())];
    ids.extend(vm.map(|vm| ("segue.io/vm", vm)));
    let chassis = format!("requested-chassis={node}");
    let request = ["lsp-set-options", lsp, &chassis].map(str::to_owned);
    [lsp_add(switch, &of_pod, &ids), request.into()]
}

/// The arguments that find the rows of a table that belong to a port, or to those of a VM's pods.
pub(super) fn find_of_pods(table: &str, lsp: &str) -> [String; 5] {
    let mark = format!("external_ids:\"{PORT_KEY}\"=\"{lsp}\"");
    ["--bare", "--columns=_uuid", "find", table, &mark].map(Into::into)
}

/// Whether a port has one of an interface's addresses.
pub(super) async fn is_taken(lab: &Lab, nic: &Nic) -> Result<bool> {
    let taken = taken_addresses(lab).await?;
    let mut addresses = nic.addresses();
    Ok(addresses.any(|own| taken.contains(&own.to_string())))
}

/// Every word of `addresses` of every logical switch port.
pub(super) async fn taken_addresses(lab: &Lab) -> Result<HashSet<String>> {
    let columns = [
        "--bare",
        "--columns=addresses",
        "list",
        "Logical_Switch_Port",
    ];
    let taken = lab.nbctl(columns).await?;
    Ok(taken.split_whitespace().map(str::to_owned).collect())
}

/// Whether the Northbound has a row of this name.
pub(super) async fn exists(lab: &Lab, table: &str, name: &str) -> Result<bool> {
    let named = format!("name={name}");
    let find = ["--bare", "--columns=_uuid", "find", table, &named];
    Ok(!lab.nbctl(find).await?.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subnets_read_alike_in_both_families() {
        let nic = Subnet(1).nic("vm1", 10);
        assert_eq!(nic.v4.unwrap().0.to_string(), "10.129.0.10");
        assert_eq!(nic.v6.unwrap().0.to_string(), "fd00:10:129::a");
        assert_eq!(nic.mac.to_string(), "0a:58:0a:81:00:0a");
        assert_eq!(Subnet::of(&nic), Some(Subnet(1)));
    }

    #[test]
    fn a_pods_port_asks_for_its_node_and_says_whose_it_is_only_if_that_is_known() {
        let nic = Subnet(0).nic("web", 10);
        let words = |vm| {
            pod_port("shared0", &nic, "node1", "demo_pod", vm)
                .concat()
                .join(" ")
        };
        let known = words(Some("demo/web"));
        for expected in [
            "lsp-add shared0 demo_pod",
            "0a:58:0a:80:00:0a 10.128.0.10 fd00:10:128::a",
            "\"scenarios.segue.io/port\"=\"web\"",
            "\"segue.io/vm\"=\"demo/web\"",
            "lsp-set-options demo_pod requested-chassis=node1",
        ] {
            assert!(known.contains(expected), "{expected} is not in {known}");
        }
        assert!(!words(None).contains("segue.io/vm"));
    }
}
