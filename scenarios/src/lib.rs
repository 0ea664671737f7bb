//! Real migrations on a real lab, and a report of what the guest's peers saw.
//!
//! [`lab`] is the machine room: network namespaces with Open vSwitch, OVN, libvirt and QEMU from a
//! Debian image, on one Linux machine, taken down without a trace. [`kubernetes`] is the API that
//! everything talks to: a real etcd and kube-apiserver. [`kubevirt`] stands in for the components
//! that work on that API in a cluster, and [`cni`] for those that write to OVN beside segue.
//! [`cluster`] puts them together with the shipped controller, [`scenario`] is the format of the
//! files that say what to run, [`runner`] runs them, and [`report`] is what comes of it.
//! [`capture`] recomputes the same from what `tcpdump` saw.

pub mod bench;
pub mod capture;
pub mod cluster;
pub mod cni;
pub mod kubernetes;
pub mod kubevirt;
pub mod lab;
pub mod report;
pub mod runner;
pub mod scenario;
