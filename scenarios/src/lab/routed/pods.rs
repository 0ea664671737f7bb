//! A network with a port for every pod, each on the switch of its node: what its owner, a CNI, does.

use anyhow::Result;

use super::super::{
    guest::Nic,
    topology::{lsp_add, taken_addresses},
};
use super::RoutedNetwork;
use super::rows::{self, PORT_KEY, Rows};

impl RoutedNetwork<'_> {
    /// Adds the port of a pod on `node` whose VM has the addresses of `nic`, and the routes to them. Returns once the
    /// Southbound database has it.
    ///
    /// Where a port has the addresses already, the pod is one that its VM migrates to, and nothing is added: the port
    /// to take over is not for whoever plugs pods to make.
    pub async fn add_pod_port(&self, nic: &Nic, node: &str, lsp: &str, vm: &str) -> Result<()> {
        let taken = taken_addresses(self.lab).await?;
        if nic.addresses().any(|own| taken.contains(&own.to_string())) {
            return Ok(());
        }
        let of_pod = Nic {
            lsp: lsp.to_owned(),
            ..nic.clone()
        };
        let ids = [("segue.io/vm", vm), (PORT_KEY, nic.lsp.as_str())];
        let chassis = format!("requested-chassis={node}");
        let mut rows = Rows::default();
        rows.add(lsp_add(node, &of_pod, &ids))
            .add(["lsp-set-options", lsp, &chassis]);
        rows::dhcp(&mut rows, nic, lsp);
        rows::host_routes(&mut rows, nic, node);
        self.lab.nbctl(rows.after(&["--wait=sb"])).await.map(drop)
    }

    /// Removes the port of a pod, unless somebody has.
    pub async fn del_pod_port(&self, lsp: &str) -> Result<()> {
        let delete = ["--if-exists", "lsp-del", lsp];
        self.lab.nbctl(delete).await.map(drop)
    }
}
