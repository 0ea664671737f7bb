//! `scenarios capture …`

use std::fs;
use std::io::{Write as _, stdout};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use scenarios::capture::{FILES, Figures, render};

/// Arguments of `scenarios capture`.
#[derive(Debug, Args)]
pub(crate) struct CaptureArgs {
    /// A migration's directory with client.pcap, source.pcap and target.pcap, or one with several
    /// of those in it, as `scenarios run` leaves it in OUT/capture.
    #[arg(value_name = "DIR")]
    dir: PathBuf,
}

pub(crate) fn run(args: &CaptureArgs) -> Result<ExitCode> {
    for dir in migrations(&args.dir)? {
        let figures = Figures::of(&dir)?;
        writeln!(stdout(), "{}\n{}\n", dir.display(), render(&figures))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The directory itself if it is a migration's, or those in it that are, by their numbers.
fn migrations(dir: &Path) -> Result<Vec<PathBuf>> {
    let has_files = |dir: &PathBuf| FILES.iter().any(|file| dir.join(file).is_file());
    if has_files(&dir.to_owned()) {
        return Ok(vec![dir.to_owned()]);
    }
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).with_context(|| dir.display().to_string())? {
        found.push(entry.with_context(|| dir.display().to_string())?.path());
    }
    found.retain(has_files);
    let number = |dir: &PathBuf| dir.file_name()?.to_str()?.parse::<u32>().ok();
    found.sort_by_key(number);
    ensure!(
        !found.is_empty(),
        "{}: there is no {} in it; a scenario with `capture: true` makes them, in OUT/capture",
        dir.display(),
        FILES.join(", ")
    );
    Ok(found)
}
