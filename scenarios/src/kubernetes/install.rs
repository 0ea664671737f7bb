//! What a cluster needs before the lab's work can start: CRDs and manifests.

use std::{
    ffi::{OsStr, OsString},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::{
    Api, ResourceExt as _,
    api::{Patch, PatchParams},
    runtime::wait::{await_condition, conditions::is_crd_established},
};
use tokio::time::timeout;

use super::{ControlPlane, Error, Spawner};

/// Trimmed from KubeVirt's: same names, versions, subresources and columns, without the schemas.
const KUBEVIRT_CRDS: [&str; 4] = [
    include_str!("../../crds/kubevirt.io_virtualmachines.yaml"),
    include_str!("../../crds/kubevirt.io_virtualmachineinstances.yaml"),
    include_str!("../../crds/kubevirt.io_virtualmachineinstancemigrations.yaml"),
    include_str!("../../crds/plugin.kubevirt.io_plugins.yaml"),
];
/// The API serves a new CRD within a second.
const ESTABLISHED_DEADLINE: Duration = Duration::from_secs(30);

/// kubectl with a kubeconfig.
pub struct Kubectl {
    program: PathBuf,
    kubeconfig: PathBuf,
    spawner: Spawner,
}

impl ControlPlane {
    /// Installs KubeVirt's CRDs (`VirtualMachine`, `VirtualMachineInstance`, `VirtualMachineInstanceMigration`,
    /// `Plugin`) and waits until they are served. Installing them twice changes nothing.
    ///
    /// # Errors
    /// When the API refuses one, or does not serve it within 30 s.
    pub async fn apply_kubevirt_crds(&self) -> Result<(), Error> {
        let crds: Api<CustomResourceDefinition> = Api::all(self.client());
        for yaml in KUBEVIRT_CRDS {
            let crd: CustomResourceDefinition =
                serde_saphyr::from_str(yaml).map_err(|error| Error::Yaml {
                    what: "a CRD of KubeVirt".into(),
                    reason: error.to_string(),
                })?;
            let name = crd.name_any();
            crds.patch(
                &name,
                &PatchParams::apply("scenarios").force(),
                &Patch::Apply(&crd),
            )
            .await
            .map_err(Error::api(format!("installing the CRD {name}")))?;
            let established = await_condition(crds.clone(), &name, is_crd_established());
            // A failing watch is retried by the runtime: what remains of it is the timeout.
            if !matches!(timeout(ESTABLISHED_DEADLINE, established).await, Ok(Ok(_))) {
                let what = format!("the CRD {name} was not established");
                return Err(Error::Timeout {
                    what,
                    waited: ESTABLISHED_DEADLINE,
                });
            }
        }
        Ok(())
    }
}

impl Kubectl {
    pub(super) fn new(program: PathBuf, kubeconfig: PathBuf, spawner: Spawner) -> Self {
        Self {
            program,
            kubeconfig,
            spawner,
        }
    }

    /// `kubectl apply -k DIRECTORY`: what an operator types.
    ///
    /// # Errors
    /// As [`Kubectl::run`].
    pub async fn apply_kustomization(&self, directory: &Path) -> Result<String, Error> {
        self.run([OsStr::new("apply"), OsStr::new("-k"), directory.as_os_str()])
            .await
    }

    /// Runs kubectl to its end and returns what it wrote to standard output.
    ///
    /// # Errors
    /// When it cannot be started, or fails: [`Error::Kubectl`] has what it complained of.
    pub async fn run<A: AsRef<OsStr>>(
        &self,
        arguments: impl IntoIterator<Item = A>,
    ) -> Result<String, Error> {
        let mut argv = vec![self.program.clone().into_os_string()];
        let mut flag = OsString::from("--kubeconfig=");
        flag.push(&self.kubeconfig);
        argv.push(flag);
        argv.extend(
            arguments
                .into_iter()
                .map(|argument| argument.as_ref().to_owned()),
        );
        let output = tokio::process::Command::from((self.spawner)(&argv))
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .output()
            .await
            .map_err(|source| Error::Spawn {
                program: self.program.clone(),
                source,
            })?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        let arguments: Vec<_> = argv
            .iter()
            .skip(2)
            .map(|argument| argument.to_string_lossy())
            .collect();
        Err(Error::Kubectl {
            arguments: arguments.join(" "),
            status: output.status,
            stderr: String::from_utf8_lossy(&output.stderr)
                .trim_end()
                .to_owned(),
        })
    }
}
