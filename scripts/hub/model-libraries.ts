// packages/tasks/src/model-libraries.ts, in MODEL_LIBRARIES_UI_ELEMENTS, between "edsnlp" and "elm"
	eigenlorax: {
		prettyLabel: "eigenlorax",
		repoName: "eigenlorax",
		repoUrl: "https://github.com/eigenlorax/eigenlorax",
		docsUrl: "https://eigenlorax.github.io/eigenlorax/",
		filter: false,
		countDownloads: `path:"subspace_config.json"`,
		snippets: snippets.eigenlorax,
	},

// packages/tasks/src/model-libraries-snippets.ts
export const eigenlorax = (model: ModelData): string[] => [
	`# pip install eigenlorax
import eigenlorax as ex

pack = ex.Pack.from_pretrained("${model.id}")
print(list(pack))  # names of the LoRA adapters
pack.export("loras/")  # an ordinary PEFT LoRA folder for each`,
];
