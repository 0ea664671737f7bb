//! OVN topologies for scenarios: which logical switches there are and which ports they have.

use std::collections::HashSet;
use std::net::{Ipv4Addr, Ipv6Addr};

use anyhow::{Context as _, Result};

use super::{Lab, guest::Nic, mac::MacAddr};

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
    /// An interface with the addresses of host number `host`, and an Ethernet address made from them as OVN's own
    /// users do: `0a:58` and the IPv4 address.
    pub fn nic(self, lsp: &str, host: u8) -> Nic {
        let v4 = Ipv4Addr::new(10, self.second(), 0, host);
        let [a, b, c, d] = v4.octets();
        Nic {
            lsp: lsp.to_owned(),
            mac: MacAddr([0x0a, 0x58, a, b, c, d]),
            v4: Some((v4, 24)),
            v6: Some((
                Ipv6Addr::new(0xfd00, 0x10, self.third(), 0, 0, 0, 0, host.into()),
                64,
            )),
            gateway4: None,
            gateway6: None,
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
        let named = format!("name={}", switch.name());
        let find = [
            "--bare",
            "--columns=_uuid",
            "find",
            "Logical_Switch",
            &named,
        ];
        if lab.nbctl(find).await?.is_empty() {
            return Self::create(lab, subnet).await;
        }
        Ok(switch)
    }

    /// The lowest host number, from `first` on, whose IPv4 address no port of the Northbound has.
    ///
    /// # Errors
    /// When the subnet is full.
    pub async fn free_host(&self, first: u8) -> Result<u8> {
        let columns = [
            "--bare",
            "--columns=addresses",
            "list",
            "Logical_Switch_Port",
        ];
        let taken = self.lab.nbctl(columns).await?;
        let taken: HashSet<_> = taken.split_whitespace().collect();
        let is_free = |host: &u8| {
            let v4 = self.subnet.nic("", *host).v4;
            v4.is_some_and(|(v4, _)| !taken.contains(v4.to_string().as_str()))
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
        let mut addresses = nic.mac.to_string();
        for address in nic
            .v4
            .map(|(v4, _)| v4.to_string())
            .into_iter()
            .chain(nic.v6.map(|(v6, _)| v6.to_string()))
        {
            addresses = format!("{addresses} {address}");
        }
        let name = self.name();
        let mut args: Vec<String> = [
            "--wait=sb",
            "lsp-add",
            &name,
            &nic.lsp,
            "--",
            "lsp-set-addresses",
            &nic.lsp,
        ]
        .map(Into::into)
        .into();
        args.push(addresses);
        for (key, value) in external_ids {
            args.extend(["--", "set", "Logical_Switch_Port", &nic.lsp].map(Into::into));
            args.push(format!("external_ids:\"{key}\"=\"{value}\""));
        }
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
