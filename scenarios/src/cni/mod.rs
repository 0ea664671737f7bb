//! CNIs whose controllers write to a VM's ports beside segue.

pub mod kube_ovn;
