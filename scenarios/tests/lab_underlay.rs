//! The network between the lab's machines.

use anyhow::{Context as _, Result, ensure};
use scenarios::lab::{Lab, LabSpec, Quiet};

/// A switch that is told two Ethernet addresses for a node keeps the last, and with the wrong one its tunnel to that
/// node leads nowhere until somebody asks again.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs root: make test runs it"]
async fn a_node_has_one_ethernet_address_on_the_underlay() -> Result<()> {
    let spec = LabSpec {
        exe: env!("CARGO_BIN_EXE_scenarios").into(),
        ..LabSpec::new("tunderlay".parse()?)?
    };
    let lab = Lab::up(&spec, &Quiet).await?;
    for index in 1..=3 {
        let address = format!("172.30.0.1{index}");
        let asked = ["arping", "-b", "-c", "3", "-I", "underlay", &address];
        let answers = lab.host("central")?.run("busybox", asked).await?;
        let from: Vec<_> = answers
            .lines()
            .filter_map(|line| line.split_once('['))
            .filter_map(|(_, rest)| rest.split_once(']'))
            .map(|(mac, _)| mac)
            .collect();
        let own = format!("02:00:00:00:00:0{index}");
        ensure!(
            !from.is_empty() && from.iter().all(|mac| **mac == own),
            "{address} is at {own} alone, but: {answers}"
        );
    }
    lab.down().map(drop).context("take it down")
}
