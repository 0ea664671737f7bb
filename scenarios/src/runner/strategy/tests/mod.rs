//! The replays, with their signs given by hand; and the signs, as a real API and hypervisors give them.

mod sequences;
mod signs;
