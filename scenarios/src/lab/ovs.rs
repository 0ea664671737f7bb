//! A host's Open vSwitch.

use anyhow::{Context as _, Result};

use super::host::Host;

/// The bridge that ovn-controller programs.
pub const INTEGRATION_BRIDGE: &str = "br-int";

/// The Open vSwitch of a node.
#[derive(Clone, Copy, Debug)]
pub struct Ovs<'a>(&'a Host);

impl<'a> Ovs<'a> {
    pub(crate) fn new(host: &'a Host) -> Self {
        Self(host)
    }

    /// Runs `ovs-vsctl` with these arguments.
    pub async fn vsctl<I, S>(&self, args: I) -> Result<String>
    where
        I: IntoIterator<Item = S>,
        S: AsRef<std::ffi::OsStr>,
    {
        let mut command = self.0.command("ovs-vsctl");
        command.arg("--timeout=30").args(args);
        super::exec::output(command)
            .await
            .with_context(|| self.0.name().to_owned())
    }

    /// Puts an interface on the integration bridge as the logical switch port `iface_id`.
    pub async fn add_port(&self, interface: &str, iface_id: &str) -> Result<()> {
        let id = format!("external_ids:iface-id={iface_id}");
        self.vsctl([
            "--may-exist",
            "add-port",
            INTEGRATION_BRIDGE,
            interface,
            "--",
            "set",
            "Interface",
            interface,
            &id,
        ])
        .await
        .map(drop)
    }

    /// Takes an interface off the integration bridge, if it is there.
    pub async fn del_port(&self, interface: &str) -> Result<()> {
        self.vsctl(["--if-exists", "del-port", INTEGRATION_BRIDGE, interface])
            .await
            .map(drop)
    }

    /// The OpenFlow port number of an interface.
    pub async fn ofport(&self, interface: &str) -> Result<u32> {
        let port = self
            .vsctl(["get", "Interface", interface, "ofport"])
            .await?;
        port.parse()
            .with_context(|| format!("{interface} has no OpenFlow port number yet: {port:?}"))
    }

    /// Whether ovn-controller says that it has programmed everything for this interface.
    pub async fn ovn_installed(&self, interface: &str) -> Result<bool> {
        let value = self
            .vsctl([
                "--if-exists",
                "get",
                "Interface",
                interface,
                "external_ids:ovn-installed",
            ])
            .await?;
        Ok(value.trim_matches('"') == "true")
    }

    /// Waits until ovn-controller says that it has programmed everything for this interface.
    pub async fn wait_ovn_installed(&self, interface: &str) -> Result<()> {
        let condition = r#"external_ids:ovn-installed="true""#;
        self.vsctl(["wait-until", "Interface", interface, condition])
            .await
            .with_context(|| format!("ovn-controller did not install {interface}"))
            .map(drop)
    }
}
