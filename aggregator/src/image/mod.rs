//! To come.

use anyhow::Result;
use clap::Args;
use oscontainer_program::options::Global;

#[derive(Debug, Clone, Args)]
pub struct ImageArgs {}

pub fn main(_args: ImageArgs, _global: &Global) -> Result<()> {
    anyhow::bail!("to come")
}
