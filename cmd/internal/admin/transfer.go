package admin

import (
	"context"
	"net/http"

	"github.com/danielgtaylor/huma/v2"
)

const importPath = "/api/v1/addresses/import"

func (a *api) registerTransfer(h huma.API) {
	get(h, "/api/v1/addresses/export", "export-addresses", "The ledger as one document", a.export)
	huma.Register(h, huma.Operation{Method: http.MethodPost, Path: importPath, OperationID: "import-addresses", MaxBodyBytes: maxImport, Summary: "Take over addresses and services of an export; what is bound here stays"}, a.importAddresses)
}

type exportOutput struct {
	ContentType string `header:"Content-Type"`
	Body        []byte
}

func (a *api) export(ctx context.Context, _ *struct{}) (*exportOutput, error) {
	data, err := a.d.Export(ctx)
	if err != nil {
		return nil, huma.Error503ServiceUnavailable(err.Error())
	}
	return &exportOutput{"application/json", data}, nil
}

// Imported is what an import came to.
type Imported struct {
	Added int `json:"added" doc:"records, services and marks that were not there"`
}

func (a *api) importAddresses(ctx context.Context, in *struct{ RawBody []byte }) (*body[Imported], error) {
	added, err := a.d.Import(ctx, in.RawBody)
	if err != nil {
		return nil, huma.Error409Conflict(err.Error())
	}
	return &body[Imported]{Imported{added}}, nil
}
