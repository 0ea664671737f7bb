//! A network with a port for every pod, each on the switch of its node: what its owner, a CNI, does.

use anyhow::Result;

use super::super::{
    guest::Nic,
    topology::{is_taken, pod_port},
};
use super::RoutedNetwork;
use super::rows::{self, Rows};

impl RoutedNetwork<'_> {
    /// Adds the port of a pod on `node` whose VM has the addresses of `nic`, and the routes to them. It says whose it is,
    /// unless that is nobody's business. Returns once the Southbound database has it.
    ///
    /// Where a port has the addresses already, the pod is one that its VM migrates to, and nothing is added: the port
    /// to take over is not for whoever plugs pods to make.
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
        let mut rows = Rows::default();
        for command in pod_port(node, nic, node, lsp, vm) {
            rows.add(command);
        }
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
