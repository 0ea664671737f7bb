//! `scenarios lab vm …`

use std::io::{Write as _, stdout};
use std::net::IpAddr;
use std::process::ExitCode;

use anyhow::{Context as _, Result, anyhow};
use clap::Args;
use scenarios::cluster::Kept;
use scenarios::lab::{Host, Lab, LabName, Progress as _, Terminal};
use scenarios::runner::SingleVm;
use scenarios::scenario::{FoundBy, Requested, Vm};

use crate::cli_lab::{interruptible, kept, lab_command};

/// Arguments of `scenarios lab vm`.
#[derive(Debug, Args)]
pub(crate) struct VmArgs {
    /// The VM's name.
    #[arg(value_name = "NAME")]
    vm: String,

    /// The node that it starts on.
    #[arg(long, default_value = "node1")]
    node: String,

    /// Its Kubernetes namespace, made if there is none.
    #[arg(long, default_value = "demo")]
    namespace: String,
}

pub(crate) fn run(name: &LabName, args: VmArgs) -> Result<ExitCode> {
    let lab = Lab::attach(name)?;
    let kept = kept(&lab)?;
    // Threads inherit it, the runtime's too.
    lab.central().enter_netns()?;
    let runtime = tokio::runtime::Runtime::new().context("tokio runtime")?;
    let spec = Vm {
        name: args.vm,
        namespace: args.namespace,
        node: args.node,
        ports: 1,
        requested_chassis: Requested::default(),
        found_by: FoundBy::default(),
        isolated: false,
        memory_mib: 128,
    };
    let (addresses, ports) = runtime.block_on(boot(&lab, &kept, &spec))?;
    let told = next_steps(&lab, &kept, &spec, &addresses, &ports)?;
    stdout().write_all(told.as_bytes())?;
    Ok(ExitCode::SUCCESS)
}

async fn boot(lab: &Lab, kept: &Kept, spec: &Vm) -> Result<(Vec<IpAddr>, Vec<String>)> {
    let progress = Terminal::default();
    progress.step(&format!("Booting {} on {}", spec.key(), spec.node));
    let vm = SingleVm::new(lab, kept.client().await?, spec.clone()).await?;
    let booted = interruptible(Box::pin(vm.start())).await;
    drop(progress);
    match booted {
        Ok(addresses) => Ok((addresses, vm.ports())),
        Err(error) if vm.tidy().await? => {
            let kubectl = format!("{} kubectl --", lab_command(lab.name())?);
            let vmi = format!("vmi -n {} {}", spec.namespace, spec.name);
            Err(anyhow!(
                "{error:#}\nVMI {} stays, to be looked at or deleted:\n  {kubectl} describe {vmi}\n  {kubectl} delete {vmi}",
                spec.key(),
            ))
        }
        Err(error) => Err(error),
    }
}

/// How a person migrates the VM, and watches it.
fn next_steps(
    lab: &Lab,
    kept: &Kept,
    spec: &Vm,
    addresses: &[IpAddr],
    ports: &[String],
) -> Result<String> {
    let (namespace, name) = (&spec.namespace, &spec.name);
    let command = lab_command(lab.name())?;
    let target = lab.nodes().map(Host::name).find(|node| *node != spec.node);
    let target = target.context("a lab of one node")?;
    let shown: Vec<_> = addresses.iter().map(IpAddr::to_string).collect();
    let first = shown.first().context("a VM without address")?;
    let port = ports.first().context("a VM without port")?;
    let in_client = format!("ip netns exec {}", lab.host("client")?.netns_name());
    let probe = kept.probe().display();
    Ok(format!(
        "\
{key} runs on {node} and answers at {addresses}. Its logical switch port is {port}.

# Measure what its peers see; Ctrl-C ends it and shows the result:
{in_client} {probe} run --target {first}

# Migrate it to {target} meanwhile, from another terminal:
{command} kubectl -- create -f - <<'END'
apiVersion: kubevirt.io/v1
kind: VirtualMachineInstanceMigration
metadata:
  generateName: {name}-
  namespace: {namespace}
spec:
  vmiName: {name}
  addedNodeSelector:
    kubernetes.io/hostname: {target}
END

# Watch it:
{command} kubectl -- get handovers -A -w
{command} kubectl -- describe vmim -n {namespace}
{command} exec central -- ovn-nbctl --columns=name,options,external_ids find Logical_Switch_Port name={port}
{command} exec central -- ovn-sbctl --columns=logical_port,chassis,additional_chassis,options find Port_Binding \
logical_port={port}
{command} exec {target} -- virsh list

# Remove it:
{command} kubectl -- delete vmi -n {namespace} {name}
",
        key = spec.key(),
        node = spec.node,
        addresses = shown.join(" and "),
    ))
}
