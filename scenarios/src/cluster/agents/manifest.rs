//! The agent as its DaemonSet has it run.
//!
//! What the lab gives an agent is read from the object that the API has, field by field. A field that says something the
//! lab cannot give is an error: then either the lab or the manifest has to change.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{
    Capabilities, Container as PodContainer, EnvVar, PodSecurityContext, PodSpec, SecurityContext,
    Volume, VolumeMount,
};

use crate::lab::Host;
use crate::lab::contain::{Capability, Container, Rights};
use crate::lab::node::Bind;

/// How the agent is run on every node.
#[derive(Clone, Debug)]
pub(super) struct Manifest {
    args: Vec<String>,
    environment: Vec<EnvVar>,
    mounts: Vec<Mount>,
    rights: Rights,
}

/// A path of the node, and where the agent sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Mount {
    host_path: PathBuf,
    target: PathBuf,
    read_only: bool,
}

impl Manifest {
    /// Reads it.
    ///
    /// # Errors
    /// When it asks for something that the lab does not give, with what that is.
    pub(super) fn of(set: &DaemonSet) -> Result<Self> {
        let template = set.spec.as_ref().and_then(|set| set.template.spec.as_ref());
        let pod = template.context("a DaemonSet without a pod")?;
        // In the host's network its interfaces are; its processes nobody needs.
        ensure!(
            pod.host_network == Some(true),
            "hostNetwork: has to be true"
        );
        ensure!(
            pod.host_pid != Some(true),
            "hostPID: the lab does not give it"
        );
        ensure!(
            pod.host_ipc != Some(true),
            "hostIPC: the lab does not give it"
        );
        ensure!(
            pod.init_containers.as_ref().is_none_or(Vec::is_empty),
            "initContainers: the lab runs none"
        );
        let [container] = pod.containers.as_slice() else {
            bail!("containers: the lab runs exactly one");
        };
        ensure!(
            container.command.is_none(),
            "command: the lab runs the program that the image is to run"
        );
        ensure!(container.env_from.is_none(), "envFrom: the lab has none");
        Ok(Self {
            args: container.args.clone().unwrap_or_default(),
            environment: container.env.clone().unwrap_or_default(),
            mounts: mounts(pod, container)?,
            rights: rights(
                pod.security_context.as_ref(),
                container.security_context.as_ref(),
            )?,
        })
    }

    /// The agent of a node, with some options other than the manifest's.
    pub(super) fn on(
        &self,
        node: &Host,
        program: &Path,
        options: &BTreeMap<&'static str, String>,
    ) -> Result<Container> {
        let mounts = self.mounts.iter().map(|mount| Bind {
            source: node.path_of(&mount.host_path),
            target: mount.target.clone(),
            read_only: mount.read_only,
        });
        let environment = self.environment.iter();
        let environment = environment.map(|variable| resolve(variable, node.name()));
        Ok(Container {
            program: program.to_owned(),
            args: with_options(&self.args, options),
            environment: environment.collect::<Result<_>>()?,
            mounts: mounts.collect(),
            rights: self.rights.clone(),
        })
    }
}

fn with_options(args: &[String], options: &BTreeMap<&'static str, String>) -> Vec<String> {
    let is_replaced = |arg: &String| {
        let name = arg.split('=').next().unwrap_or_default();
        options.contains_key(name)
    };
    let kept = args.iter().filter(|arg| !is_replaced(arg)).cloned();
    let given = options
        .iter()
        .map(|(name, value)| format!("{name}={value}"));
    kept.chain(given).collect()
}

fn resolve(variable: &EnvVar, node: &str) -> Result<(String, String)> {
    let EnvVar {
        name,
        value,
        value_from,
    } = variable;
    let field = value_from.as_ref().map(|from| {
        let field = from.field_ref.as_ref();
        field.map_or("", |field| field.field_path.as_str())
    });
    let value = match field {
        None => value.clone().unwrap_or_default(),
        Some("spec.nodeName") => node.to_owned(),
        Some(_) => bail!("env {name}: the lab knows a node's name only"),
    };
    Ok((name.clone(), value))
}

fn mounts(pod: &PodSpec, container: &PodContainer) -> Result<Vec<Mount>> {
    let mut mounts = Vec::new();
    for VolumeMount {
        mount_path,
        // What is mounted on a host of the lab is there before its agent is.
        mount_propagation: _,
        name,
        read_only,
        recursive_read_only,
        sub_path,
        sub_path_expr,
    } in container.volume_mounts.iter().flatten()
    {
        ensure!(
            recursive_read_only.is_none() && sub_path.is_none() && sub_path_expr.is_none(),
            "volumeMount {name}: the lab mounts whole volumes"
        );
        let mut volumes = pod.volumes.iter().flatten();
        let volume = volumes.find(|volume| volume.name == *name);
        mounts.push(Mount {
            host_path: host_path(volume.with_context(|| format!("there is no volume {name}"))?)?,
            target: mount_path.into(),
            read_only: *read_only == Some(true),
        });
    }
    Ok(mounts)
}

fn host_path(volume: &Volume) -> Result<PathBuf> {
    let host_path = volume.host_path.as_ref();
    let host_path = host_path.with_context(|| {
        format!(
            "volume {}: the lab gives paths of the node only",
            volume.name
        )
    })?;
    Ok(PathBuf::from(&host_path.path))
}

/// A container's own word counts before its pod's.
fn rights(pod: Option<&PodSecurityContext>, own: Option<&SecurityContext>) -> Result<Rights> {
    let pod = pod.cloned().unwrap_or_default();
    let PodSecurityContext {
        app_armor_profile,
        fs_group,
        fs_group_change_policy: _,
        run_as_group: group_of_pod,
        run_as_non_root: non_root_of_pod,
        run_as_user: user_of_pod,
        se_linux_change_policy: _,
        se_linux_options,
        // A filter of system calls: it takes away, and is not among what the lab gives.
        seccomp_profile: _,
        supplemental_groups,
        supplemental_groups_policy: _,
        sysctls,
        windows_options,
    } = pod;
    ensure!(
        app_armor_profile.is_none()
            && fs_group.is_none()
            && se_linux_options.is_none()
            && sysctls.is_none()
            && windows_options.is_none(),
        "securityContext of the pod: the lab knows users, groups and seccompProfile"
    );
    let own = own.cloned().unwrap_or_default();
    let SecurityContext {
        allow_privilege_escalation,
        app_armor_profile,
        capabilities,
        privileged,
        proc_mount,
        read_only_root_filesystem,
        run_as_group,
        run_as_non_root,
        run_as_user,
        se_linux_options,
        seccomp_profile: _,
        windows_options,
    } = own;
    ensure!(
        app_armor_profile.is_none()
            && proc_mount.is_none()
            && se_linux_options.is_none()
            && windows_options.is_none(),
        "securityContext: the lab knows users, capabilities, readOnlyRootFilesystem and allowPrivilegeEscalation"
    );
    ensure!(
        privileged != Some(true),
        "privileged: the lab does not give it"
    );
    // Where nothing is said it is root, as the image has it.
    let user = id(run_as_user.or(user_of_pod).unwrap_or_default(), "runAsUser")?;
    ensure!(
        user != 0 || run_as_non_root.or(non_root_of_pod) != Some(true),
        "runAsNonRoot: with which user? runAsUser names none"
    );
    let groups = supplemental_groups.into_iter().flatten();
    let groups = groups.map(|group| id(group, "supplementalGroups"));
    Ok(Rights {
        user,
        group: id(
            run_as_group.or(group_of_pod).unwrap_or_default(),
            "runAsGroup",
        )?,
        groups: groups.collect::<Result<_>>()?,
        capabilities: added(capabilities.unwrap_or_default())?,
        no_new_privileges: allow_privilege_escalation == Some(false),
        read_only_root: read_only_root_filesystem == Some(true),
    })
}

/// What is added to nothing: what a runtime gives where not all is dropped is the runtime's own matter.
fn added(capabilities: Capabilities) -> Result<BTreeSet<Capability>> {
    let Capabilities { add, drop } = capabilities;
    ensure!(
        drop.iter().flatten().any(|dropped| dropped == "ALL"),
        "capabilities: drop [ALL] first, then add what is needed"
    );
    let added = add.into_iter().flatten();
    added.map(Capability::try_from).collect()
}

fn id(number: i64, what: &str) -> Result<u32> {
    u32::try_from(number).with_context(|| format!("{what}: {number}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is shipped, as kustomize would apply it but for names and labels.
    fn shipped() -> DaemonSet {
        let yaml = include_str!("../../../../manifests/agent/daemonset.yaml");
        serde_saphyr::from_str(yaml).unwrap()
    }

    fn pod(set: &mut DaemonSet) -> &mut PodSpec {
        let spec = set.spec.as_mut().unwrap();
        spec.template.spec.as_mut().unwrap()
    }

    fn capabilities(names: &[&str]) -> BTreeSet<Capability> {
        let made = names
            .iter()
            .map(|name| Capability::try_from((*name).to_owned()));
        made.map(Result::unwrap).collect()
    }

    #[test]
    fn the_shipped_manifest_is_understood_in_full() {
        let manifest = Manifest::of(&shipped()).unwrap();
        assert_eq!(
            manifest.rights,
            Rights {
                user: 0,
                group: 0,
                groups: BTreeSet::new(),
                capabilities: capabilities(&["NET_RAW", "DAC_OVERRIDE"]),
                no_new_privileges: true,
                read_only_root: true,
            }
        );
        let writable: Vec<_> = manifest
            .mounts
            .iter()
            .filter(|mount| !mount.read_only)
            .map(|mount| mount.target.to_str().unwrap())
            .collect();
        assert_eq!(writable, ["/var/run/kubevirt/plugins"]);
    }

    #[test]
    fn what_the_lab_cannot_give_is_an_error() {
        type Change = fn(&mut PodSpec);
        let own = |pod: &mut PodSpec| pod.containers[0].security_context.clone().unwrap();
        assert_eq!(own(pod(&mut shipped())).privileged, None);
        let changes: [(Change, &str); 6] = [
            (|pod| pod.host_pid = Some(true), "hostPID"),
            (|pod| pod.host_network = None, "hostNetwork"),
            (
                |pod| {
                    let own = pod.containers[0].security_context.as_mut().unwrap();
                    own.privileged = Some(true);
                },
                "privileged",
            ),
            (
                |pod| {
                    let own = pod.containers[0].security_context.as_mut().unwrap();
                    own.capabilities.as_mut().unwrap().drop = None;
                },
                "drop [ALL]",
            ),
            (
                |pod| pod.volumes.as_mut().unwrap()[0].host_path = None,
                "paths of the node only",
            ),
            (
                |pod| {
                    let context = pod.security_context.as_mut().unwrap();
                    context.fs_group = Some(1);
                },
                "of the pod",
            ),
        ];
        for (change, named) in changes {
            let mut set = shipped();
            change(pod(&mut set));
            let error = Manifest::of(&set).unwrap_err().to_string();
            assert!(error.contains(named), "{named}: {error}");
        }
    }

    #[test]
    fn an_option_replaces_the_manifests() {
        let args = ["--controller=x:1", "--log=json"].map(str::to_owned);
        let options = [
            ("--controller", "y:2".to_owned()),
            ("--listen", "z".to_owned()),
        ];
        let options = options.into_iter().collect();
        assert_eq!(
            with_options(&args, &options),
            ["--log=json", "--controller=y:2", "--listen=z"]
        );
    }

    #[test]
    fn the_nodes_name_comes_from_the_node() {
        let manifest = Manifest::of(&shipped()).unwrap();
        let environment = manifest.environment.iter();
        let resolved: Vec<_> = environment
            .map(|it| resolve(it, "node7").unwrap())
            .collect();
        assert_eq!(
            resolved,
            [("SEGUE_NODE_NAME".to_owned(), "node7".to_owned())]
        );
    }
}
