//! `cargo xtask vm`: kernel tests in an emulated machine with the kernel that Debian 12 brings.
//!
//! The machine sees this one's files read-only, so test programs that were built here run there as they are. Each boot is another kind of
//! machine that weft promises to run on and that this one is not.

mod boots;
mod emulator;
mod initramfs;
mod inside;
mod job;
mod judge;
mod kernel;
mod modules;
mod programs;

use std::fs;
use std::path::Path;

use anyhow::{Context as _, ensure};

use crate::steps::{step, target};
use crate::{artifacts, images, machine};
use boots::{BOOTS, Boot, Run};
use job::{Job, Program};
use kernel::Kernel;
use programs::Built;

pub(crate) use inside::run as work_inside;

/// What the command line says of a run by hand.
pub(crate) struct Wish {
    /// Boots (`v2`) or runs of them (`v2/dataplane`); none stands for all.
    pub(crate) runs: Vec<String>,
    /// Names of tests, in place of those that a run chooses.
    pub(crate) tests: Vec<String>,
}

/// Installs and builds what the machines need, and runs what was wished.
pub(crate) fn run(wish: &Wish) -> anyhow::Result<()> {
    machine::check()?;
    machine::install_for_tests()?;
    machine::install_for_vm()?;
    artifacts::build_all(false)?;
    images::build_all()?;
    images::build_for_tests()?;
    boot_all(wish)
}

/// Runs all boots, with everything built already.
pub(crate) fn run_all() -> anyhow::Result<()> {
    boot_all(&Wish { runs: Vec::new(), tests: Vec::new() })
}

/// Why no machine can be emulated here, if so.
pub(crate) fn missing() -> Option<String> {
    if std::env::consts::ARCH != "x86_64" {
        return Some(format!("the emulated machine is an x86_64, this one an {}", std::env::consts::ARCH));
    }
    let programs = [emulator::PROGRAM, "depmod", "mke2fs"];
    let program = programs.into_iter().find(|program| weft_tests_harness::which(program).is_none())?;
    Some(format!("no {program} on PATH; `cargo xtask vm` installs it"))
}

fn boot_all(wish: &Wish) -> anyhow::Result<()> {
    let kernel = kernel::fetch()?;
    let boots: Vec<(&Boot, Vec<&Run>)> = BOOTS.iter().map(|boot| (boot, wish.of(boot))).collect();
    let names: Vec<&str> = boots.iter().flat_map(|(_, runs)| runs).map(|run| run.test).collect();
    ensure!(!names.is_empty(), "there is no run of such a name; these are: {}", boots::names().join(" "));
    let built = step("build the tests", || programs::build(&names))?;
    let mut failed = Vec::new();
    for (boot, runs) in boots.iter().filter(|(_, runs)| !runs.is_empty()) {
        if let Err(error) = one(boot, runs, wish, &kernel, &built) {
            eprintln!("{error:#}");
            failed.push(boot.name);
        }
    }
    ensure!(failed.is_empty(), "failed in the emulated machine: {}", failed.join(", "));
    Ok(())
}

impl Wish {
    /// What of a boot is wished.
    fn of<'a>(&self, boot: &'a Boot) -> Vec<&'a Run> {
        let named = |run: &&Run| {
            let full = format!("{}/{}", boot.name, run.name);
            self.runs.is_empty() || self.runs.iter().any(|name| name == boot.name || *name == full)
        };
        boot.runs.iter().filter(named).collect()
    }
}

/// Boots one machine, has it work, and judges what it said.
fn one(boot: &Boot, runs: &[&Run], wish: &Wish, kernel: &Kernel, built: &Built) -> anyhow::Result<()> {
    let folder = target("vm")?.join(boot.name);
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let programs: Vec<_> = runs.iter().map(|run| program(run, wish, built)).collect::<anyhow::Result<_>>()?;
    let job = Job {
        cgroups: boot.cgroups,
        modules: kernel.modules.clone(),
        load: boot.load.iter().map(|name| (*name).to_owned()).collect(),
        environment: environment()?,
        programs,
    };
    let title = format!("Linux {} in an emulated machine, {}", kernel.release, boot.title);
    let mut summary = Vec::new();
    let outcome = step(&title, || {
        let said = emulator::boot(kernel, &job, &folder)?;
        let outcome = judge::judge(runs, &job.programs, &said);
        summary = outcome.summary;
        judge::verdict(&outcome.wrong, &folder)
    });
    for line in summary {
        eprintln!("     {line}");
    }
    outcome
}

/// What the test programs are told, where what they use lies.
fn environment() -> anyhow::Result<Vec<(String, String)>> {
    let artifacts = target("artifacts")?;
    let text = |path: &Path| path.to_string_lossy().into_owned();
    Ok(vec![
        ("PATH".to_owned(), std::env::var("PATH").context("no PATH")?),
        ("WEFT_ARTIFACTS".to_owned(), text(&artifacts)),
        ("WEFT_IMAGES".to_owned(), text(&target("images")?)),
        ("WEFT_INIT".to_owned(), text(&artifacts.join("weft-init"))),
    ])
}

fn program(run: &Run, wish: &Wish, built: &Built) -> anyhow::Result<Program> {
    let path = built.program(run.package, run.test)?;
    let owned = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
    let tests = if wish.tests.is_empty() { owned(run.tests) } else { wish.tests.clone() };
    let folder = crate::steps::root().join(run.package);
    Ok(Program { name: run.name.to_owned(), path, folder, args: owned(run.args), tests })
}
