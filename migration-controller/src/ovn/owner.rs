//! Whose port a Logical_Switch_Port is.

use handover::VmName;

use super::LogicalSwitchPort;

/// `external_ids` key that names a port's VM: `<namespace>/<name>`.
const VM_LABEL: &str = "segue.io/vm";

/// What Kubernetes has to say of OVN's rows: which of the VMs that a port may belong to exist, and
/// which chassis a node is.
pub(crate) trait Owners {
    /// Whether the VM exists.
    fn knows(&self, vm: &VmName) -> bool;

    /// The chassis that a node names as its own.
    fn chassis_of(&self, _node: &str) -> Option<String> {
        None
    }
}

/// The VMs that a port may belong to, the likeliest first.
///
/// A label says it outright, and so does the `pod` that Kube-OVN writes on its ports (for a VM's
/// port it holds the VM's name). What is left is the name `<vm>.<namespace>[.<provider>]`, which can
/// be read in several ways, since VMs and providers may have dots in their names: the longest VM
/// name comes first.
pub(crate) fn candidates(port: &LogicalSwitchPort) -> Vec<VmName> {
    if !port.r#type.is_empty() {
        return Vec::new();
    }
    let ids = &port.external_ids;
    if let Some(vm) = ids.get(VM_LABEL) {
        return split(vm).into_iter().collect();
    }
    if ids.get("vendor").is_some_and(|vendor| vendor == "kube-ovn")
        && let Some(vm) = ids.get("pod").and_then(|pod| split(pod))
    {
        return vec![vm];
    }
    let dots: Vec<_> = port.name.match_indices('.').map(|(at, _)| at).collect();
    dots.into_iter()
        .rev()
        .filter_map(|dot| {
            let (vm, rest) = (&port.name[..dot], &port.name[dot + 1..]);
            let namespace = rest.split('.').next().unwrap_or(rest);
            (!vm.is_empty() && !namespace.is_empty()).then(|| VmName::new(namespace, vm))
        })
        .collect()
}

/// The VM that a port belongs to: the likeliest of those that exist.
pub(crate) fn owner(port: &LogicalSwitchPort, owners: &impl Owners) -> Option<VmName> {
    candidates(port).into_iter().find(|vm| owners.knows(vm))
}

fn split(text: &str) -> Option<VmName> {
    let (namespace, name) = text.split_once('/')?;
    let whole = !namespace.is_empty() && !name.is_empty() && !name.contains('/');
    whole.then(|| VmName::new(namespace, name))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    struct Known<'a>(&'a [&'a str]);

    impl Owners for Known<'_> {
        fn knows(&self, vm: &VmName) -> bool {
            self.0.contains(&vm.to_string().as_str())
        }
    }

    fn port(name: &str, ids: &[(&str, &str)]) -> LogicalSwitchPort {
        LogicalSwitchPort {
            name: name.into(),
            r#type: String::new(),
            addresses: Vec::new(),
            options: BTreeMap::new(),
            external_ids: ids.iter().map(|&(k, v)| (k.into(), v.into())).collect(),
        }
    }

    fn owner_of(port: &LogicalSwitchPort, known: &[&str]) -> Option<String> {
        owner(port, &Known(known)).map(|vm| vm.to_string())
    }

    #[test]
    fn kube_ovns_names_are_understood() {
        let known: &[&str] = &["tenant/w0"];
        for name in ["w0.tenant", "w0.tenant.blue.tenant.ovn", "w0.tenant.blue"] {
            assert_eq!(
                owner_of(&port(name, &[]), known).as_deref(),
                Some("tenant/w0"),
                "{name}"
            );
        }
        for name in [
            "w0",
            "w0.",
            ".tenant",
            "w0.other",
            "w1.tenant",
            "xw0.tenant",
            "",
        ] {
            assert_eq!(owner_of(&port(name, &[]), known), None, "{name}");
        }
    }

    #[test]
    fn a_name_with_dots_goes_to_the_vm_that_exists_and_the_longest_of_those() {
        let port = port("a.b.c", &[]);
        assert_eq!(owner_of(&port, &["b/a"]).as_deref(), Some("b/a"));
        assert_eq!(owner_of(&port, &["c/a.b"]).as_deref(), Some("c/a.b"));
        assert_eq!(owner_of(&port, &["b/a", "c/a.b"]).as_deref(), Some("c/a.b"));
    }

    #[test]
    fn a_label_outweighs_the_name() {
        let labelled = port("w0.tenant", &[("segue.io/vm", "tenant/w1")]);
        assert_eq!(
            owner_of(&labelled, &["tenant/w0", "tenant/w1"]).as_deref(),
            Some("tenant/w1")
        );
        let nonsense = port("w0.tenant", &[("segue.io/vm", "w1")]);
        assert_eq!(owner_of(&nonsense, &["tenant/w0", "tenant/w1"]), None);
        let kube_ovn = port("a.b.c", &[("vendor", "kube-ovn"), ("pod", "b/a")]);
        assert_eq!(
            owner_of(&kube_ovn, &["b/a", "c/a.b"]).as_deref(),
            Some("b/a")
        );
    }

    #[test]
    fn ports_that_are_no_machines_have_no_owner() {
        let mut port = port("w0.tenant", &[]);
        port.r#type = "localnet".into();
        assert_eq!(owner_of(&port, &["tenant/w0"]), None);
    }
}
