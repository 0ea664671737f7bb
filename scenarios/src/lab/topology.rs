//! OVN topologies for scenarios: which logical switches there are and which ports they have.

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context as _, Result};

use super::{
    Lab,
    guest::Nic,
    mac::MacAddr,
    routed::{GATEWAY4, GATEWAY6, is_routed},
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
        format!("shared{}", self.subnet.0)
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

    /// Removes a logical switch port, if it is there.
    pub async fn del_port(&self, lsp: &str) -> Result<()> {
        self.lab
            .nbctl(["--wait=sb", "--if-exists", "lsp-del", lsp])
            .await
            .map(drop)
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
    }
}
